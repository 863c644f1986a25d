# make            builds ./llama
# make demo       builds it and tells a story with the model that ships here
# make test       builds and runs every test that this machine can run
# make test-gpu   the tests that need a GPU, alone; make test-gpu-plain, sanitize-gpu and compare-gpu (beside PyTorch) go further
# make lib        the attention kernels alone: build/libattention.so (model/attention/attention.h is its interface)
# make bench      measures the GPU on weights of LLaMA 3.1 8B's shape, made from a seed (without a GPU, the CPU on 3.2 1B's)
# make bench-cpu  measures the CPU engine
# make bench-tokenizer  encoding beside tiktoken and HuggingFace tokenizers; make check-tokenizer compares their ids on a
#                 million strings and more. They fetch both from PyPI, and need LLaMA 3's vocabulary (RANKS, a tokenizer.model)
# make asan       the tests once more, under AddressSanitizer and UBSan
# make fuzz       the readers under libFuzzer (clang): FUZZ_SECONDS for each target, or FUZZ_RUNS; FUZZ names the targets;
#                 make fuzz-tokenizer does ten minutes of that one
# make install    the program and its manual page, to PREFIX/bin and PREFIX/share/man/man1 (PREFIX=/usr/local; DESTDIR before it)
# make lint       clang-tidy and cppcheck; what they are not asked is in .clang-tidy and tests/cppcheck.txt, with reasons
# make coverage   how many lines of the CPU's sources the tests reach
# make valgrind   the reading of good and bad files under valgrind
# make clean
#
# CUDA=0 leaves the CUDA Toolkit alone; CUDA_HOME says where it is. CC, CFLAGS and LDFLAGS are yours to add to.

# make's own default is cc, which not every machine with gcc has.
ifeq ($(origin CC),default)
CC := $(notdir $(firstword $(foreach name,gcc cc clang,$(shell command -v $(name) 2>/dev/null))))
endif
CUDA     ?= 1
BUILD    ?= build
PROGRAM  ?= llama
PREFIX   ?= /usr/local

# ---- what this machine has ------------------------------------------------------------------------------------------

NVCC    := $(if $(filter 0,$(CUDA)),,$(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null)))
OPENMP  := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
# Line editing in --chat: readline, libedit or none.
HASH    := \#
try_line = $(shell printf '$(HASH)include <stdio.h>\n$(HASH)include <$(1)>\nint main(void) { return !readline; }' | $(CC) -x c - -o /dev/null $(2) 2>/dev/null && echo yes)
LINE    := $(if $(call try_line,readline/readline.h,-lreadline),readline,$(if $(call try_line,editline/readline.h,-ledit),edit,none))
X86     := $(findstring x86_64,$(shell $(CC) -dumpmachine))

# GPUs to build for: this machine's, or where there is none all that are supported.
GPU_HERE    := $(if $(NVCC),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/\.//; s/^90$$/90a/'))
CUDA_ARCHS  ?= $(or $(GPU_HERE),80 86 89 90a 100 120)
GENCODE      = $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch))
CUDA_ROOT   := $(abspath $(dir $(realpath $(NVCC)))..)
CUDA_LDFLAGS := $(if $(NVCC),-L$(CUDA_ROOT)/lib64 -Xlinker -rpath -Xlinker $(CUDA_ROOT)/lib64 -lcublas -lcublasLt -lcudart -lstdc++)
CUDA_CFLAGS := $(if $(NVCC),-DLLAMA_CUDA)

# ---- flags ----------------------------------------------------------------------------------------------------------

WARNINGS := -Wall -Wextra -Werror
# No contraction: a product and a sum are fused where ops_cpu.c is compiled and nowhere else, so that RoPE's frequencies,
# say, are the same on every machine.
ALL_CFLAGS  := -std=gnu11 -O3 -ffp-contract=off $(WARNINGS) $(OPENMP) -MMD -MP $(CUDA_CFLAGS) $(CFLAGS)
ALL_LDFLAGS := $(OPENMP) $(LDFLAGS) $(CUDA_LDFLAGS) $(if $(filter-out none,$(LINE)),-l$(LINE)) -lm
LINE_CFLAGS := $(if $(filter edit,$(LINE)),-DREADLINE_HEADER='<editline/readline.h>' -DHISTORY_HEADER='<editline/readline.h>' -DLINE_EDITOR='"libedit"',\
                 -DREADLINE_HEADER='<readline/readline.h>' -DHISTORY_HEADER='<readline/history.h>' -DLINE_EDITOR='"readline"')
NVCC_FLAGS   = -std=c++17 -O3 -Xfatbin -compress-all $(GENCODE) -I. -Xcompiler -Wall,-Wextra,-fopenmp
OPS_CFLAGS  := -ffp-contract=fast -Wno-psabi

# ---- sources --------------------------------------------------------------------------------------------------------

LIBRARY := cli/converse.c cli/flags.c cli/input.c cli/interrupt.c cli/line.c cli/output.c cli/version.c \
           model/batch.c model/bench.c model/checkpoint.c model/compare.c model/error.c model/forward_cpu.c model/generate.c model/json.c model/machine_cpu.c model/model.c model/perplexity.c \
           model/safetensors.c model/sampler.c tokenizer/bpe.c tokenizer/chat.c tokenizer/split.c tokenizer/tokenizer.c
LIBRARY += $(if $(X86),model/ops_x86.c,model/ops_other.c)
LIBRARY += $(if $(filter none,$(LINE)),cli/line_plain.c,cli/line_readline.c)
OPS     := portable $(if $(X86),avx2)

# The GPU engine, where there is nvcc.
CUDA_LIBRARY := $(if $(NVCC),model/forward_cuda.cu model/cuda/fused.cu model/machine_cuda.cu attention.cu)

LIBRARY_OBJECTS := $(CUDA_LIBRARY:%.cu=$(BUILD)/%.o) $(LIBRARY:%.c=$(BUILD)/%.o) $(OPS:%=$(BUILD)/model/ops_%.o)
TESTS           := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
GPU_TESTS       := $(if $(NVCC),$(patsubst tests/%.cu,$(BUILD)/tests/%,$(wildcard tests/test_*.cu)))

.SECONDARY: # objects of tests stay
.PHONY: all demo test test-gpu test-gpu-plain sanitize-gpu compare-gpu lib install bench bench-cpu bench-tokenizer check-tokenizer asan lint coverage valgrind fuzz fuzz-tokenizer clean FORCE

all: $(PROGRAM)
	@echo "built $(PROGRAM), $(if $(NVCC),with its GPU engine for $(CUDA_ARCHS) ($(NVCC)),for the CPU only: $(if $(filter 0,$(CUDA)),CUDA=0,no nvcc in CUDA_HOME or PATH))"

$(PROGRAM): $(BUILD)/llama.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# Everything is built anew when the compiler or its flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CC) $(ALL_CFLAGS) $(ALL_LDFLAGS) $(NVCC) $(NVCC_FLAGS)' | cmp -s - $@ || \
	 echo '$(CC) $(ALL_CFLAGS) $(ALL_LDFLAGS) $(NVCC) $(NVCC_FLAGS)' > $@

# What --version says of the sources and of CUDA; compiled anew when it changes.
COMMIT  := $(shell git -C $(CURDIR) describe --always --dirty=+ --exclude='*' 2>/dev/null || echo unknown)
CUDA_IS := $(if $(NVCC),CUDA $(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') for sm $(CUDA_ARCHS),no CUDA)

$(BUILD)/version: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMIT) $(CUDA_IS)' | cmp -s - $@ || echo '$(COMMIT) $(CUDA_IS)' > $@

$(BUILD)/cli/line_readline.o: cli/line_readline.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LINE_CFLAGS) -c $< -o $@

$(BUILD)/cli/version.o: cli/version.c $(BUILD)/flags $(BUILD)/version
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DCOMMIT='"$(COMMIT)"' -DCUDA_IS='"$(CUDA_IS)"' -c $< -o $@

$(BUILD)/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@

# Engine fused is for Hopper and later.
FUSED_ARCHS := $(or $(filter-out 80 86 89,$(CUDA_ARCHS)),90a)
$(BUILD)/model/cuda/fused.o: GENCODE = $(foreach arch,$(FUSED_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch))

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -c $< -o $@

# One source, compiled once for each instruction set.
$(BUILD)/model/ops_portable.o: model/ops_cpu.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(OPS_CFLAGS) -DOPS_TABLE=ops_portable -DOPS_NAME='"portable"' -c $< -o $@

$(BUILD)/model/ops_avx2.o: model/ops_cpu.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(OPS_CFLAGS) -mavx2 -mfma -DOPS_TABLE=ops_avx2 -DOPS_NAME='"AVX2"' -c $< -o $@

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# What goes wrong in test_failures.
$(BUILD)/tests/inject.so: tests/inject.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O1 $(WARNINGS) -fPIC -shared $< -o $@ -ldl

lib: $(BUILD)/libattention.so

$(BUILD)/libattention.so: attention.cu $(wildcard model/attention/*) model/cuda/ptx.cuh model/cuda/numbers.cuh model/cuda/rule.h $(BUILD)/flags
	@mkdir -p $(@D)
	$(if $(NVCC),,$(error make lib needs nvcc: none in CUDA_HOME or PATH, or CUDA=0))
	$(NVCC) $(NVCC_FLAGS) -Xcompiler -fPIC -shared $< -o $@

# ---- use ------------------------------------------------------------------------------------------------------------

$(BUILD)/manual: $(BUILD)/cli/manual.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

$(BUILD)/llama.1: $(BUILD)/manual
	./$< > $@

install: all $(BUILD)/llama.1
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1
	install $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/llama
	install -m 644 $(BUILD)/llama.1 $(DESTDIR)$(PREFIX)/share/man/man1/llama.1

demo: all
	./$(PROGRAM) model/stories.bin -p "Once upon a time" --echo -n 200 --temp 0.7 --top-p 0.9
	@echo

# Thousands of runs go wrong on purpose where a run starts in milliseconds: without CUDA's libraries.
test: all $(TESTS) $(GPU_TESTS) $(BUILD)/tests/inject.so
	@INJECT_LIBRARY=$(if $(NVCC),,$(BUILD)/tests/inject.so) SIGNALS=$${SIGNALS:-$(if $(NVCC),200,1000)} LLAMA=./$(PROGRAM) sh tests/run.sh $(TESTS) $(GPU_TESTS) $(wildcard tests/test_*.sh tests/test_*.py)

test-gpu: all $(GPU_TESTS)
	@LLAMA=./$(PROGRAM) sh tests/run.sh $(GPU_TESTS) tests/test_engine_gpu.sh

# The attention of GPUs other than Hopper, on whichever is here: code for compute_80, which the driver compiles at start.
$(BUILD)/tests/test_attention_plain: tests/test_attention.cu attention.cu $(BUILD)/libattention.so
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 -I. -gencode arch=compute_80,code=compute_80 tests/test_attention.cu attention.cu -o $@

test-gpu-plain: $(BUILD)/tests/test_attention_plain
	@sh tests/run.sh $<

sanitize-gpu: all $(GPU_TESTS)
	for tool in memcheck racecheck initcheck synccheck; do \
	  echo "== $$tool" && compute-sanitizer --tool $$tool --error-exitcode 9 $(BUILD)/tests/test_attention --small > $(BUILD)/$$tool.log 2>&1; \
	  status=$$?; tail -n 2 $(BUILD)/$$tool.log; [ $$status -eq 0 ] || exit 1; done
	compute-sanitizer --tool memcheck --error-exitcode 9 ./$(PROGRAM) model/stories.bin -p "Once" -n 20 --engine cublas

# Needs Python with torch and transformers.
compare-gpu: lib $(BUILD)/tests/read_ceiling
	python3 scripts/check_attention_torch.py --csv $(BUILD)/attention.csv --plot $(BUILD)/attention.png
	python3 scripts/hf_attention.py

bench: all
	./$(PROGRAM) --synthetic $(if $(GPU_HERE),llama-3.1-8b,llama-3.2-1b) --bench

bench-cpu: all
	./$(PROGRAM) --synthetic llama-3.2-1b --bench --engine cpu

# ---- the tokenizer beside its peers ---------------------------------------------------------------------------------

RANKS        ?= ../shared/tokenizer/tokenizer.model
VENV         := build/venv-tokenizer
LLAMA3_VOCAB := $(BUILD)/llama3-vocab.bin

$(VENV)/installed: scripts/requirements-tokenizer.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

$(LLAMA3_VOCAB): $(RANKS) scripts/convert.py
	@mkdir -p $(@D)
	python3 scripts/convert.py --vocab-only $< $@

bench-tokenizer: $(BUILD)/tests/bench_tokenizer $(LLAMA3_VOCAB) $(VENV)/installed
	$(VENV)/bin/python scripts/bench_tokenizer.py --ranks $(RANKS) --model $(LLAMA3_VOCAB) --program $< --csv $(BUILD)/bench-tokenizer.csv

check-tokenizer: $(PROGRAM) $(LLAMA3_VOCAB) $(VENV)/installed
	$(VENV)/bin/python scripts/gen_unicode.py | cmp - tokenizer/unicode_tables.h
	$(VENV)/bin/python scripts/check_tokenizer.py --ranks $(RANKS) --model $(LLAMA3_VOCAB) --program ./$(PROGRAM)

asan:
	SANITIZERS=1 SIGNALS=60 $(MAKE) BUILD=build/asan PROGRAM=build/asan/llama CUDA=0 CFLAGS="$(CFLAGS) -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS="$(LDFLAGS) -fsanitize=address,undefined" test

LINTED      := llama.c $(sort $(LIBRARY)) model/ops_cpu.c
LINT_DEFINE := -DCOMMIT='""' -DCUDA_IS='""' -DOPS_TABLE=ops_portable -DOPS_NAME='""' $(LINE_CFLAGS)

lint:
	clang-tidy --quiet $(LINTED) -- -std=gnu11 $(LINT_DEFINE)
	cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --std=c11 --suppressions-list=tests/cppcheck.txt $(LINT_DEFINE) $(LINTED)

# gcov's own sums, of the sources that make the CPU's program.
coverage:
	rm -rf build/coverage && mkdir -p build/coverage
	+@OMP_NUM_THREADS=1 SIGNALS=40 $(MAKE) BUILD=build/coverage PROGRAM=build/coverage/llama CUDA=0 CFLAGS="$(CFLAGS) -g --coverage" LDFLAGS="$(LDFLAGS) --coverage" test; \
	 status=$$?; sh tests/coverage.sh build/coverage > build/coverage/summary; cat build/coverage/summary >&2; exit $$status

VALGRIND_TESTS := bad_input cli batch
VALGRIND_UNITS := safetensors chat

# Of the comparisons those of a model of one layer: under valgrind the story model's take minutes each.
valgrind: all $(TESTS)
	@for unit in $(VALGRIND_UNITS); do valgrind -q --error-exitcode=99 $(BUILD)/tests/test_$$unit || exit 1; done
	@LLAMA=tests/valgrind.sh PROGRAM=./$(PROGRAM) $(BUILD)/tests/test_compare --script
	@LLAMA=tests/valgrind.sh PROGRAM=./$(PROGRAM) sh tests/run.sh $(VALGRIND_TESTS:%=$(BUILD)/tests/test_%)

# ---- fuzzing --------------------------------------------------------------------------------------------------------
# libFuzzer with ASan and UBSan. What it learns is kept in build/fuzz/corpus; tests/fuzz has the seeds.

FUZZ         ?= $(sort $(patsubst tests/fuzz_%.c,%,$(wildcard tests/fuzz_*.c)))
FUZZ_SECONDS ?= 60
FUZZ_RUNS    ?= -1
FUZZ_BUILD   := build/fuzz
FUZZ_MAKE    := $(MAKE) CC=clang CUDA=0 BUILD=$(FUZZ_BUILD) CFLAGS="-g -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all"

fuzz:
	+@$(FUZZ_MAKE) LDFLAGS="-fsanitize=fuzzer,address,undefined" $(FUZZ:%=$(FUZZ_BUILD)/tests/fuzz_%)
	@for target in $(FUZZ); do \
	  mkdir -p $(FUZZ_BUILD)/corpus/$$target && echo "== fuzz $$target" && \
	  $(FUZZ_BUILD)/tests/fuzz_$$target -max_total_time=$(if $(filter -1,$(FUZZ_RUNS)),$(FUZZ_SECONDS),0) -runs=$(FUZZ_RUNS) -max_len=2048 -timeout=10 \
	    -rss_limit_mb=2048 $$(ls tests/fuzz/$$target.dict 2>/dev/null | sed 's/^/-dict=/') -artifact_prefix=$(FUZZ_BUILD)/$$target- -print_final_stats=1 \
	    $(FUZZ_BUILD)/corpus/$$target tests/fuzz/$$target > $(FUZZ_BUILD)/$$target.log 2>&1; \
	  status=$$?; grep -E 'number_of_executed_units|average_exec' $(FUZZ_BUILD)/$$target.log; \
	  [ $$status -eq 0 ] || { tail -n 40 $(FUZZ_BUILD)/$$target.log; exit 1; }; done

fuzz-tokenizer:
	+@$(MAKE) fuzz FUZZ=tokenizer FUZZ_SECONDS=$(if $(filter file,$(origin FUZZ_SECONDS)),600,$(FUZZ_SECONDS))

clean:
	rm -rf build llama

-include $(LIBRARY_OBJECTS:.o=.d) $(BUILD)/llama.d $(BUILD)/cli/manual.d $(TESTS:=.d) $(BUILD)/tests/bench_tokenizer.d
