# Uses the python of the active environment: . .venv/bin/activate
.DEFAULT_GOAL := help
.PHONY: help check test demo tiny report proof bench-train bench-transfer bench-prior bench-memory bench-sdxl

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check: ## lint
	python -m ruff check .

test: ## the quick tests: no network, no GPU
	python -m pytest

demo: ## the main job: how much of every shipped control survives on every member of the embedded family
	python -m analysis.transfer

tiny: ## train the embedded family anew, all parts; continues where it was
	python train/tiny.py all

report: ## draw report.html again from the results on disk
	python -m analysis.report

bench-train: ## the fast slider recipe against the published one: seconds, evaluations, effect
	python train/bench.py

bench-transfer: ## what drawing for the transfer validator costs beyond the networks themselves
	python -m analysis.bench

bench-prior: ## how well a student draws with a LoRA on it, with and without the prior term
	python train/bench_prior.py

bench-memory: ## memory of a training step on SDXL's U-Net: estimated, and measured where there is a GPU
	python train/bench_memory.py

bench-sdxl: ## SDXL at full size with random weights on a GPU: seconds per image and training step, memory, beside diffusers
	python train/bench_sdxl.py

proof: ## the slow tests: minutes each
	python -m pytest -m slow
