# make train: the set-up and `python a3c.py`.  make test: the set-up and `pytest`, in two processes.
PYTHON ?= python3
PIP = .venv/bin/python -m pip
INSTALL = $(PIP) install --quiet --disable-pip-version-check
# With an NVIDIA driver, TensorFlow also needs the CUDA libraries that pip can bring.
CUDA = $(if $(shell command -v nvidia-smi),'tensorflow[and-cuda]>=2.21')

train: .venv/ready
	.venv/bin/python a3c.py $(FLAGS)

test: .venv/tested
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal $(FLAGS)

.venv/ready: requirements.txt
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(INSTALL) -r requirements.txt $(CUDA)
	touch $@

.venv/tested: .venv/ready requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@

.PHONY: train test
