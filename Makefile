# make train   a trained, explained model of generated birds, in minutes
# make serve   the same behind HTTP, with a page, on this machine alone
# make workbench   a page on which people correct it, and see what each decision costs
# make test    lint, types and the whole test suite
# make bench   every hot path against what the machine allows
# Each makes .venv from requirements.lock first, if it isn't there or is older than the lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_AUTH_MODE ?= disabled
export PYTHONUNBUFFERED = 1

.PHONY: train serve workbench test unit lint bench lock sbom clean

train: $(VENV)/.installed
	$(BIN)/python jobs/train.py --config configs/quickstart.yaml $(ARGS)

# The quickstart's bundle, trained first if it isn't there; ARGS='--bundles runs/mine/bundle' serves others.
serve: $(VENV)/.installed
	@case "$(ARGS)" in *--bundles*|*--config*|*--help*) ;; *) \
	  test -e runs/quickstart/bundle/model.json || $(MAKE) train ARGS= ;; esac
	$(BIN)/python -m serve $(ARGS)

# The quickstart's bundle and data, trained first if they aren't there; ARGS='runs/mine/bundle my-images' are others.
workbench: $(VENV)/.installed
	@test -n "$(ARGS)" || test -e runs/quickstart/bundle/model.json || $(MAKE) train ARGS=
	$(BIN)/python jobs/workbench.py $(or $(ARGS),runs/quickstart/bundle runs/quickstart/stages/00-data)

test: lint unit
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/networks $(ARGS)
	$(BIN)/python -m pytest tests/ray tests/system $(ARGS)

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The marker is written last: an interrupted installation is begun again.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: protopnet needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The lock names versions for every platform, and no registry's host.
lock:
	uv pip compile pyproject.toml --extra dev --extra aws --extra export --extra heic --extra dicom --extra delta --extra mlflow --universal --python-version 3.11 --no-header --no-annotate -o requirements.lock

# What requirements.lock names, as CycloneDX: sbom.json, which the container image takes with it.
SBOM ?= sbom.json
sbom: $(VENV)/.installed
	$(BIN)/python -W ignore -m cyclonedx_py requirements requirements.lock --pyproject pyproject.toml --output-reproducible -o $(SBOM)

clean:
	rm -rf $(VENV) build dist *.egg-info

# Every hot path against what the machine allows; some 25 minutes on two cores, and quiet ones.
bench: $(VENV)/.installed
	@failed=0; for name in joint_step feed push last_layer two_workers prototype_layer explain score serve; do \
	  record=--record; [ $$name = prototype_layer ] && record=; \
	  $(BIN)/python bench/$$name.py $$record || failed=1; done; exit $$failed
