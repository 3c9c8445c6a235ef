# Every target is a thin call of a Python module that can be run by hand; `make` prints them.

TASK   ?= slang
MODEL  ?= gemma-3-270m
PEFT   ?= lora
ENGINES := $(if $(filter serve up,$(MAKECMDGOALS)),embedded vllm,lightning automodel)
ENGINE ?= $(firstword $(ENGINES))
TO     ?= adapter
RUNTIME ?= auto
PYTHON ?= python3

# What may stand on make's command line; a misspelt name would otherwise be a default that nobody asked for.
variables := TASK MODEL PEFT ENGINE TO RUNTIME PYTHON ARGS SOURCE NAME TITLE ASKED ANSWER PREVIEW CONTEXT CONDITION QUESTION RUNS REPO DATASET \
	TASKS GPUS BASE KIND VARIANT BASE_IMAGE PROFILES IMAGE TRAIN_IMAGE DRY_RUN NODES GPUS_PER_NODE CPUS_PER_NODE PARTITION \
	ACCOUNT QOS TIME CONTAINER SWEEP NAMESPACE OVERLAY EXPOSE JOB GATEWAY_PORT GRPC_PORT WEB_PORT PROMETHEUS_PORT \
	GRAFANA_PORT PROMETHEUS_IMAGE GRAFANA_IMAGE WEB_NAME OWNER WORKERS CC KERNEL_CFLAGS HF_TOKEN PIP_FIND_LINKS MASTER_ADDR MASTER_PORT NODE_RANK
given := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(variables),$(given)),$(error $(name) is no variable of this Makefile. Known: $(variables)))

# No value is expanded, by make or by the shell: "$(…)" in one is text. Recipes take values from the environment or in
# quotes; the words of ARGS are told apart as the shell would, and each is quoted.
$(foreach name,$(variables),$(if $(filter command environment,$(origin $(name))),$(eval export override $(name) := $$(value $(name)))))
$(foreach name,PYTHON CC,$(if $(findstring $$,$($(name)))$(findstring `,$($(name))),$(error $(name)=$($(name)) is not the name of a program)))
quoted = '$(subst ','\'',$1)'
args := $(if $(strip $(ARGS)),$(shell $(PYTHON) -c 'import shlex, sys; print(shlex.join(shlex.split(sys.argv[1])))' $(call quoted,$(ARGS)) 2>/dev/null))
$(if $(strip $(ARGS)),$(if $(args),,$(error ARGS has a quote that is never closed: $(ARGS))))

# A name that does not exist is answered before anything is installed. (An image being built has no names yet.)
# Folders of PYTHONPATH may bring tasks of their own, see docs/tasks.md.
homes := ./ $(addsuffix /,$(subst :, ,$(PYTHONPATH)))
known = $(sort $(basename $(notdir $(wildcard $(addsuffix nemo_configs/$1/*.yaml,$(homes))))))
one_of = $(if $(word 2,$1),,$(filter $(subst %,\%,$1),$2))
check = $(if $(call one_of,$2,$(or $(call known,$1),$2)),,$(error $3=$2 is unknown. Known: $(call known,$1)))
# A model may be named as on the hub: gemma-4-E2B.
override MODEL := $(if $(call one_of,$(MODEL),$(call known,model)),$(MODEL),$(shell printf %s $(call quoted,$(MODEL)) | tr A-Z a-z))
$(call check,task,$(TASK),TASK)
$(call check,model,$(MODEL),MODEL)
$(call check,peft,$(PEFT),PEFT)
$(if $(call one_of,$(ENGINE),$(ENGINES)),,$(error ENGINE=$(ENGINE) is unknown. Known: $(ENGINES)))
RUNTIMES := auto local container slurm k8s
$(if $(call one_of,$(RUNTIME),$(RUNTIMES)),,$(error RUNTIME=$(RUNTIME) is unknown. Known: $(RUNTIMES)))

# Where a training runs. Each launcher takes a module and its words; what a scheduler wants to know besides (NODES,
# GPUS_PER_NODE, PARTITION, ACCOUNT, TIME, DRY_RUN, IMAGE ...) it finds in the environment, where make puts whatever was
# given on its command line. `auto` is the container where an engine that answers and an NVIDIA GPU are there.
ifeq ($(RUNTIME),auto)
GPU := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl)
WHY := $(if $(GPU),$(if $(filter train,$(MAKECMDGOALS)),$(shell $(PYTHON) docker/container.py --why-not 2>&1)),there is no NVIDIA GPU)
override RUNTIME := $(if $(WHY),local,container)
$(if $(filter train,$(MAKECMDGOALS)),$(info RUNTIME=auto: $(RUNTIME), as $(or $(WHY),there are an NVIDIA GPU and a container engine)))
endif
LAUNCH_local = $(RUN)
LAUNCH_container = $(PYTHON) docker/container.py
LAUNCH_slurm = $(PYTHON) docker/slurm.py
LAUNCH_k8s = $(PYTHON) docker/kubernetes.py
LAUNCH = $(LAUNCH_$(RUNTIME))

RUN := .venv/bin/python -m
# Files of tests side by side, each on one thread: two trainings that share two cores' threads take ten times as long.
# One more than there are cores, as many a test waits; those with slow tests first (tests/conftest.py).
WORKERS := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n $(call quoted,$(WORKERS)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CONFIG = task=$(TASK) model=$(MODEL) peft=$(PEFT) engine=$(ENGINE) $(if $(GPUS),"trainer.devices=$$GPUS") $(if $(SOURCE),"task.data.source=$$SOURCE") $(args)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# --- the way of the data -----------------------------------------------------------------------------------------
.PHONY: train data new-task base generate chat report compare convert publish attempts
train: $(if $(filter local,$(RUNTIME)),.venv/train.stamp $(if $(filter automodel,$(ENGINE)),.venv-automodel/automodel.stamp))  ## fine-tune MODEL on TASK: base, data, training, report  SOURCE=my.csv GPUS=8 ARGS="seed=1"
	@$(LAUNCH) commands.train $(CONFIG)

data: .venv/train.stamp  ## prepare the data of TASK and show it  SOURCE=my.csv ARGS="examples=5"
	@$(RUN) commands.data $(CONFIG)

new-task: .venv/train.stamp  ## write a task for a table of your own, as a start  NAME=films SOURCE=reviews.csv TITLE="..." PREVIEW=1 ASKED=column ANSWER=column
	@$(RUN) commands.new_task "name=$$NAME" "source=$$SOURCE" "title=$$TITLE" "asked=$$ASKED" "answer=$$ANSWER" $(if $(PREVIEW),preview=true)

base: .venv/train.stamp  ## only fetch or build MODEL  HF_TOKEN=hf_... for gated ones
	@$(RUN) commands.base model=$(MODEL) $(args)

generate: .venv/train.stamp  ## ask base and fine-tuned model side by side  CONTEXT="..." CONDITION="..." QUESTION="..." TEXT="..."
	@$(RUN) commands.generate task=$(TASK) $(if $(CONTEXT),"context=$$CONTEXT") $(if $(CONDITION),"condition=$$CONDITION") $(if $(QUESTION),"question=$$QUESTION") $(if $(TEXT),"text=$$TEXT") $(args)

chat: .venv/train.stamp  ## talk with the newest run of TASK in the terminal  ARGS=run=FOLDER
	@$(RUN) commands.chat task=$(TASK) $(args)

report: .venv/train.stamp  ## ask, measure and report the newest run thoroughly  ARGS="run=FOLDER judge.url=..."
	@$(RUN) commands.report task=$(TASK) $(args)

compare: .venv/train.stamp  ## all finished runs of TASK side by side  RUNS="a b"
	@$(RUN) commands.compare task=$(TASK) $(if $(RUNS),"runs=$$RUNS") $(args)

convert: .venv/train.stamp  ## newest run to another format, proven  TO=adapter, merged, gguf ... BASE=folder
	@nemo="$$(ls -t runs/$(TASK)/*/$(TASK).nemo 2>/dev/null | head -n 1)"; \
	[ -n "$$nemo" ] || { echo "error: no finished run of $(TASK). Train first: make train TASK=$(TASK)" >&2; exit 2; }; \
	$(RUN) commands.convert "source=$$nemo" to=$(call quoted,$(TO)) $(if $(BASE),"base=$$BASE") $(args)

publish: .venv/train.stamp  ## newest run to the Hugging Face hub  REPO=name/model DATASET=name/data DRY_RUN=1
	@$(RUN) commands.publish task=$(TASK) "repo=$$REPO" to=$(call quoted,$(TO)) $(if $(DATASET),"dataset=$$DATASET") $(if $(DRY_RUN),dry_run=true) $(args)

attempts: .venv/train.stamp  ## the slang generator's three attempts, to docs/attempts.md  SOURCE=all_slangs.csv
	@$(RUN) benchmarks.attempts model=$(MODEL) $(if $(SOURCE),"task.data.source=$$SOURCE") $(args)

# --- serving ------------------------------------------------------------------------------------------------------
# TASKS=a,b or a TASK that was named must have a finished run; the default one is served if it has.
comma := ,
space := $(subst ,, )
served := $(or $(subst $(comma), ,$(TASKS)),$(if $(filter file default,$(origin TASK)),,$(TASK)))
$(foreach task,$(served),$(call check,task,$(task),TASKS))
.PHONY: serve
serve: .venv/train.stamp .venv-serve/serve.stamp  ## serve the newest run of each of TASKS with Triton  TASKS=slang,squid_game ENGINE=vllm ARGS="--help"
	@$(RUN) commands.prepare_serving $(if $(served),tasks=$(subst $(space),$(comma),$(strip $(served))),default=$(TASK)) $(if $(filter file default,$(origin MODEL)),,model=$(MODEL)) engine=$(ENGINE)
	@$(if $(filter embedded,$(ENGINE)),.venv-serve/bin/python -m commands.serve $(args))

.PHONY: client
client:  ## build the wheel of the client, which needs no torch, into dist/
	@$(PYTHON) -m pip wheel -q --no-deps --wheel-dir dist .
	@ls dist/gemma_nemo_client-*.whl

# --- speed --------------------------------------------------------------------------------------------------------
.PHONY: bench
bench: .venv/train.stamp  ## speed of training and serving beside peers, to docs/  SOURCE=my.csv ARGS="rows=128"
	@$(MAKE) --no-print-directory .venv-bench/bench.stamp || echo "The peers of bench.lock could not be installed: going on without them"
	@$(RUN) benchmarks.train $(CONFIG)
	@if [ -d exports/slang/adapter ]; then $(RUN) benchmarks.serve; \
	else echo "Serving is not measured: it needs an adapter. make train TASK=slang && make convert TASK=slang"; fi

.venv-bench/bench.stamp: bench.lock
	$(install_environment)

# --- containers ---------------------------------------------------------------------------------------------------
.PHONY: image up down
image:  ## build the image of KIND with docker, podman or buildah  KIND=train, serve VARIANT=cpu, gpu BASE_IMAGE=...
	@$(PYTHON) docker/image.py $(call quoted,$(or $(KIND),train)) $(if $(VARIANT),$(call quoted,$(VARIANT)))

up:  ## Triton, website, Prometheus and Grafana in containers  TASKS=slang,chat VARIANT=cpu, gpu PROFILES=cpu
	@ENGINE=$(ENGINE) $(PYTHON) docker/stack.py up $(served)

down:  ## end what `make up` began
	@$(PYTHON) docker/stack.py down

# --- Kubernetes ---------------------------------------------------------------------------------------------------
.PHONY: cluster
cluster:  ## a namespace with claims and serving on Kubernetes  RUNTIME=k8s OVERLAY=cpu, gpu TASKS=slang EXPOSE=grpc DRY_RUN=1
	@$(if $(filter k8s,$(RUNTIME)),,$(error make cluster is for RUNTIME=k8s; Slurm clusters need nothing before make train))
	@$(PYTHON) docker/kubernetes.py cluster

# --- the website ----------------------------------------------------------------------------------------------------
.PHONY: web web-pictures
web: .venv-serve/serve.stamp  ## the website, and the model behind it if none answers  ARGS="port=8081 clean=true"; WEB_PASSWORD in the environment
	@.venv-serve/bin/python -m commands.web $(args)

web-pictures: .venv/dev.stamp  ## docs/web.png and docs/web-phone.png of a running site  ARGS=site=http://127.0.0.1:8080
	@$(RUN) commands.web_pictures $(args)

# --- the developer's house ----------------------------------------------------------------------------------------
.PHONY: test test-quick sanitize lint docs docs-check lock clean help
test: .venv/dev.stamp  ## the whole test suite, real 270M model included
	@for name in serve megatron; do \
		$(MAKE) --no-print-directory .venv-$$name/$$name.stamp || echo "$$name.lock could not be installed: its tests are skipped"; done
	@$(PYTEST) $(args)

test-quick: .venv/dev.stamp  ## without the slow tests, under 3 minutes
	@$(PYTEST) -m "not slow" $(args)

# The address sanitizer has to be the first library of the process; libstdc++ follows, so that it finds the exceptions of
# torch. Leaks are not looked for: Python's own would hide ours.
sanitizers = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(or $(CC),cc) -print-file-name=$(name)))
sanitize: .venv/dev.stamp  ## the kernels' quick tests with both C files built to find wrong addresses and undefined behaviour
	@KERNEL_CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(sanitizers)" \
	OMP_NUM_THREADS=1 $(RUN) pytest -q -p no:cacheprovider --capture=sys tests/test_training_kernels.py tests/test_engine.py \
	-m "not slow" -k "test_training_kernels and not packed_step and not threads or every_form or no_bit_depends or int8_weights" $(args)

lint: .venv/dev.stamp  ## ruff, mypy and the import contracts
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports

docs: .venv/dev.stamp  ## regenerate figures, pictures and references in README.md and docs/
	@$(RUN) commands.docs && $(RUN) commands.config_reference && $(RUN) commands.artifact_reference

docs-check: docs  ## fail if `make docs` changes anything that is committed
	@git diff --exit-code --stat -- README.md docs

lock: .venv/train.stamp  ## renew the lock files from pyproject.toml
	for group in train serve automodel; do .venv/bin/uv pip compile -q --upgrade --group $$group -o $$group.lock || exit 1; done
	.venv/bin/uv pip compile -q --upgrade --no-deps --group megatron -o megatron.lock
	for group in dev bench; do .venv/bin/uv pip compile -q --upgrade --group $$group -c train.lock -o $$group.lock || exit 1; done

clean:  ## remove environments and caches; data, models and runs stay
	rm -rf .venv .venv-serve .venv-bench .venv-automodel .venv-megatron build *.egg-info .pytest_cache .ruff_cache .mypy_cache

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/; s/(\S)  +(\S)/\1\t\2/' | expand -t 22,84
	@echo "TASK:  $(call known,task)"
	@echo "MODEL: $(call known,model)"
	@echo "PEFT:  $(call known,peft)"
	@echo "ENGINE: $(ENGINES); make serve: embedded vllm"
	@echo "RUNTIME: $(RUNTIMES)"

# --- environments ---------------------------------------------------------------------------------------------
# A stamp file per lock file: a second run starts at once, a renewed lock is installed.
# torch, in this order: the one this Python already has (a container's; where that Python is of a virtual environment
# itself, as in NVIDIA's NeMo image, outer.pth names its packages, which a venv of a venv does not see), a wheel from pip's own wheel folder
# (--find-links, for machines without network), else the build that fits the machine's GPU or CPU.
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)

define install_environment
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing. Install it: sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); 3.11 or 3.12 is needed. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. Install it: sudo apt-get install python3-venv"; exit 1; }
	@[ ! -L $(@D) ] || { echo "$(@D) is a link, and installing would empty the folder behind it. Remove the link first"; exit 1; }
	@echo "Installing $< into $(@D) (once; about 2 GB, a few minutes)"
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "torch: the one $(PYTHON) already has"; $(PYTHON) -m venv --clear --system-site-packages $(@D); \
		$(PYTHON) -c 'import site, sys; print(*site.getsitepackages() if sys.prefix != sys.base_prefix else [], sep="\n")' \
			> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"; \
	else $(PYTHON) -m venv --clear $(@D); fi
	@sed -n '/^uv==/,/[^\\]$$/p' $< > $(@D)/uv.lock && $(@D)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $(@D)/uv.lock
	@$(@D)/bin/python -c 'import torch' 2>/dev/null || \
		$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-index --no-deps $(TORCH) 2>/dev/null || \
		$(@D)/bin/uv pip install --python $(@D)/bin/python --torch-backend auto $(TORCH)
	$(@D)/bin/uv pip install -q --python $(@D)/bin/python --no-deps --require-hashes -r $<
	@touch $@
endef

.venv/train.stamp: train.lock
	$(install_environment)

.venv/dev.stamp: dev.lock .venv/train.stamp
	@.venv/bin/uv pip install -q --python .venv/bin/python --no-deps --require-hashes -r $<
	@touch $@

.PHONY: automodel-env
automodel-env: .venv-automodel/automodel.stamp  ## only install the environment of ENGINE=automodel (2.5 GB)

.venv-automodel/automodel.stamp: automodel.lock
	$(install_environment)

# Beside .venv, whose torch it takes: with megatron-core inside, NeMo would take other ways. Megatron-Bridge is for
# Python 3.12, and here only read.
.PHONY: megatron-env
megatron-env: .venv-megatron/megatron.stamp  ## only install NVIDIA's megatron-core, which slow tests hold to=megatron to (20 MB)

.venv-megatron/megatron.stamp: megatron.lock .venv/train.stamp
	@rm -rf .venv-megatron
	@.venv/bin/uv pip install -q --python .venv/bin/python --target .venv-megatron --no-deps --require-hashes -r $<
	@sed -n '/^megatron-bridge==/,/[^\\]$$/p' $< > .venv-megatron/bridge.lock && .venv/bin/uv pip install -q --python .venv/bin/python \
		--python-version 3.12 --target .venv-megatron/bridge --no-deps --require-hashes -r .venv-megatron/bridge.lock
	@touch $@

.PHONY: serve-env
serve-env: .venv-serve/serve.stamp  ## only install the serving environment (Triton)

.venv-serve/serve.stamp: serve.lock
	$(install_environment)
