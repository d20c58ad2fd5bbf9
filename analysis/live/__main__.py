"""python -m analysis.live"""

from analysis.live import Config, main
from configs import entry

if __name__ == "__main__":
    entry(main, Config)
