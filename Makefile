# `make` alone lists what there is. Every target prepares its environment (tools/env.py) first.
ENV = python=$$(python3 tools/env.py $(1)) && comfyui=$$(dirname "$$python")/../../ComfyUI
CODE = __init__.py nodes trainers demo headless tools tests benchmarks

MATRIX = 0.30.0/newest 0.30.0/oldest 0.16.3/newest 0.16.3/oldest

.PHONY: help env test test-fast test-matrix stress lint demo clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env:  ## prepare the environment outside the checkout; prints its python
	@python3 tools/env.py --browser

lint:  ## ruff format --check, ruff check, pyright
	@$(call ENV) && $(LINT)

test:  ## lint and all tests, against a real ComfyUI and a browser, on two cores
	@$(call ENV,--browser) && $(LINT) && "$$python" -m pytest -q -n 2 --dist loadfile --durations=15

test-fast:  ## the tests that are not slow and need no server and no browser
	@$(call ENV) && "$$python" -m pytest -q -m "not slow and not server and not browser"

test-matrix:  ## the server tests on the newest and oldest ComfyUI, diffusers and peft
	@unset COMFYUI_PATH; failed=; for row in $(MATRIX); do \
		python=$$(python3 tools/env.py --comfyui "$${row%/*}" --libraries "$${row#*/}") || exit 1; \
		echo "ComfyUI $${row%/*}, $${row#*/} diffusers and peft:"; \
		"$$python" -m pytest -q -m "server and not browser" $(ARGS) || failed="$$failed $$row"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

stress:  ## break things for a long time: fuzzed files, hundreds of runs, many clients
	@$(call ENV) && nice -n 5 "$$python" -m pytest -q -m stress --durations=0 $(ARGS)

demo:  ## train on a made-up subject and compare before with after, into demo/output/
	@$(call ENV) && "$$python" -m demo.run $(ARGS)

clean:  ## remove what runs leave in the checkout
	@rm -rf demo/output demo/work .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ComfyUI's own sources let pyright see the types behind `comfy` and `comfy_api`.
define LINT
"$$python" -m ruff format --check -q $(wildcard $(CODE)) \
&& "$$python" -m ruff check -q $(wildcard $(CODE)) \
&& PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYTHONPATH="$$comfyui" "$$python" -m pyright --pythonpath "$$python"
endef
