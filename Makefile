# make train: the set-up and `python a3c.py`.  make test: the set-up and `pytest`, in two processes.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
# With an NVIDIA driver, TensorFlow also needs the CUDA libraries that pip can bring.
CUDA = $(if $(shell command -v nvidia-smi),'tensorflow[and-cuda]>=2.21')

train: .venv/ready
	.venv/bin/python a3c.py $(FLAGS)

test: .venv/tested
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal $(FLAGS)

.venv/ready: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt $(CUDA)
	touch $@

.venv/tested: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

.PHONY: train test
