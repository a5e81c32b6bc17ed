# make curves   baseline against TST, from a fresh machine to curves.png in some minutes
# make moe      the same for a small mixture of experts, to curves_moe.png
# make bench    step time, loss and loader, as ratios
# make test     ruff, then all tests on two cores
# make test-cuda   tests on a GPU, with PYTHON as it is
# make clean    removes the environment and the pictures; the runs in out/ stay

PYTHON ?= python3
BIN := .venv/bin

.PHONY: curves moe bench test test-cuda clean

# Both at one learning rate, which is the best of three for either side (results/pinned).
curves: .venv/ready data/python_source/meta.json
	$(BIN)/python train.py config/curves.py --out_dir=out/baseline --overwrite --bag_size=1
	$(BIN)/python train.py config/curves.py --out_dir=out/tst --overwrite
	$(BIN)/python -m tools.plot out/baseline out/tst --out=curves.png

moe: .venv/ready data/python_source/meta.json
	$(BIN)/python train.py config/curves_moe.py --out_dir=out/moe_baseline --overwrite --bag_size=1
	$(BIN)/python train.py config/curves_moe.py --out_dir=out/moe_tst --overwrite
	$(BIN)/python -m tools.plot out/moe_baseline out/moe_tst --out=curves_moe.png

bench: .venv/ready
	$(BIN)/python -m tools.bench

test: .venv/ready-test
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-cuda:
	$(PYTHON) -m pytest -q tests/cuda

data/python_source/meta.json: data/python_source/wheels.txt | .venv/ready
	$(BIN)/python data/python_source/prepare.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-test: requirements-test.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv curves.png curves_moe.png
