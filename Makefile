# Uses the python of the active environment: . .venv/bin/activate
.DEFAULT_GOAL := help
.PHONY: help check test demo tiny docs report paper proof bench-train bench-transfer bench-prior bench-adapted bench-memory bench-sdxl gpu

LORA := python -m controls.convert hub:

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

docs: ## write the tables of README.md and docs/ from records, cards and commands; python docs/make.py RUN … takes a run's record
	python docs/make.py

report: ## draw report.html again from the results on disk
	python -m analysis.report

bench-train: ## the fast slider recipe against the published one: seconds, evaluations, effect
	python train/bench/recipes.py

bench-transfer: ## which share of a transfer cell is spent outside network, VAE and evaluators
	python -m analysis.bench

bench-prior: ## how well a student draws with a LoRA on it, with and without the prior term
	python train/bench/prior.py

bench-adapted: ## what a run with adapt=true has brought, what it leaves, and how far it could go at best
	python train/bench/adapted.py

bench-memory: ## memory of a training step on SDXL's U-Net, estimated
	python train/bench/memory.py

bench-sdxl: ## SDXL at full size with random weights on a GPU: seconds per image, memory, beside diffusers
	python train/bench/sdxl.py

gpu: ## all that only a GPU can show, in at most 9 minutes, into docs/records/gpu.json; needs no network
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" python train/bench/gpu.py

paper: ## the paper's tables and figures on SDXL, PixArt and SD 2.1: a GPU, the extras dreamsim and inception, data/ (see configs/paper), days
	for name in age smile muscular; do accelerate launch train/slider.py config=configs/sliders/$$name-sdxl.yaml || exit 1; done
	accelerate launch train/sliderspace.py config=configs/sliderspaces/car-sdxl.yaml
	$(LORA)ostris/watercolor_style_lora_sdxl/watercolor_v1_sdxl.safetensors runs/lora/watercolor.safetensors member=sdxl/base \
		name=watercolor positive="a watercolor painting" negative="a photo"
	$(LORA)ostris/crayon_style_lora_sdxl/crayons_v1_sdxl.safetensors runs/lora/crayon.safetensors member=sdxl/base \
		name=crayon positive="a crayon drawing" negative="a photo"
	$(LORA)lordjia/lelo-lego-lora-for-xl-sd1-5/Lego_XL_v2.1.safetensors runs/lora/lego.safetensors member=sdxl/base \
		name=lego positive="made of LEGO" negative="a photo"
	for name in t1 t1-car; do accelerate launch -m analysis.transfer config=configs/paper/$$name.yaml || exit 1; done
	for name in t2 t3 d1 e1 fig7; do accelerate launch -m analysis.diversity config=configs/paper/$$name.yaml || exit 1; done
	accelerate launch -m analysis.diversity config=configs/paper/d1.yaml family=sd21 students=[turbo] name=d1-sd21
	accelerate launch -m analysis.trace config=configs/paper/fig5.yaml

proof: ## the slow tests
	python -m pytest -m slow
