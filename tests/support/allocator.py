"""What torch's own allocator says of a call."""

import json

from torch.profiler import ProfilerActivity, profile


def allocated(call, folder) -> int:
    """The most bytes that a call held on the CPU beyond what was there, by torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    record.export_chrome_trace(str(folder / "trace.json"))
    events = [
        e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"
    ]
    totals = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])
