# make demo     the whole job on real photographs, on a CPU, in minutes
# make demo-video  clips against single frames, on a film and on moving digits, in minutes
# make demo-audio  a streaming codec on music and speech, beside Opus, in minutes
# make test     the quick tests          make check   lint, types and all tests (what CI runs)
# make docs     the documents as a site  make clean   remove .venv, site, runs/demo and data/demo
# make install  only make .venv ready
#
# Each target is a line that can be copied; all of them are idempotent and echo what they run.

PYTHON ?= python3
BIN := .venv/bin
# the tests start hundreds of interpreters: byte code is kept even where the shell says otherwise; the C library keeps
# what it was given back: a page that is new to a process is dear on a virtual machine
TESTING := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
# a worker a core: one more imports too, and they slow each other
WORKERS := -n 2 --dist worksteal
LAUNCH := --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 --mixed_precision no --dynamo_backend no

.PHONY: help install demo demo-video demo-audio test check docs clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 8

install: .venv/.ready
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	touch .venv/.ready

demo: install
	$(BIN)/ldm-vae assets demo data/demo
	$(BIN)/ldm-vae assets lpips --net alex
	$(BIN)/accelerate launch $(LAUNCH) -m train.autoencoder configs/demo.yaml
	$(BIN)/ldm-vae encode runs/demo/vae data/demo/photographs runs/demo/latents --resolution 256
	$(BIN)/ldm-vae evaluate runs/demo/vae data/demo/heldout --output runs/demo/report --resolution 64
	$(BIN)/ldm-vae report runs/demo
	@echo
	@echo "Open runs/demo/report/index.html in a browser. The VAE is in runs/demo/vae, its latents in runs/demo/latents."
	@echo "Next, on a folder of your own images:"
	@echo "  $(BIN)/ldm-vae inspect PHOTOS"
	@echo "  $(BIN)/ldm-vae train configs/kl_f8_d4.yaml --data.path PHOTOS --output_dir runs/mine"

# two data sets, each an autoencoder of clips and one of single frames: the same command with another model
VIDEO := $(BIN)/accelerate launch $(LAUNCH) -m train.autoencoder
SHOWN := --metrics psnr,ssim,lpips_alex,temporal_l1,flicker
MOVING := --data.path data/moving/train --output_dir runs/demo_video

demo-video: install
	$(BIN)/ldm-vae assets clip data/film
	$(BIN)/ldm-vae assets moving_digits data/moving
	$(BIN)/ldm-vae assets lpips --net alex
	$(VIDEO) configs/demo_video.yaml
	$(VIDEO) configs/demo_video_frames.yaml
	$(VIDEO) configs/demo_video.yaml $(MOVING)/moving_clips
	$(VIDEO) configs/demo_video_frames.yaml $(MOVING)/moving_frames
	$(BIN)/ldm-vae evaluate runs/demo_video/film_clips/vae runs/demo_video/film_frames/vae data/film/heldout \
	    --frames 25 --resolution 128 --resize none --batch_size 1 $(SHOWN) --output runs/demo_video/film
	$(BIN)/ldm-vae evaluate runs/demo_video/moving_clips/vae runs/demo_video/moving_frames/vae data/moving/heldout \
	    --frames 33 --resolution 64 --max_images 12 --batch_size 1 $(SHOWN) --output runs/demo_video/moving
	$(BIN)/ldm-vae report runs/demo_video/film
	$(BIN)/ldm-vae report runs/demo_video/moving
	$(BIN)/python -m eval.filmstrip runs/demo_video/film runs/demo_video/moving runs/demo_video/frames.png

demo-audio: install
	$(BIN)/ldm-vae assets sounds data/sounds
	$(BIN)/accelerate launch $(LAUNCH) -m train.autoencoder configs/demo_audio.yaml
	$(BIN)/ldm-vae evaluate runs/demo_audio/vae data/sounds/heldout --excerpt 96000 --batch_size 1 \
	    --output runs/demo_audio/report
	$(BIN)/ldm-vae report runs/demo_audio
	$(BIN)/python -m eval.opus runs/demo_audio/vae data/sounds/heldout --output runs/demo_audio/opus

test: install
	$(BIN)/ldm-vae assets lpips
	$(TESTING) $(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu and not browser"

# types beside the tests: from a clean clone mypy takes a core for a minute and a half
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; \
	  $(BIN)/ldm-vae assets lpips && $(TESTING) $(BIN)/python -m pytest $(WORKERS) -m "not gpu"; tests=$$?; \
	  wait $$types && exit $$tests

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "Open site/index.html in a browser."

clean:
	rm -rf .venv site runs/demo data/demo
