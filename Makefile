# make            builds ./llama
# make demo       builds it and tells a story with the model that ships here
# make test       builds and runs every test that this machine can run. TEST="cli ops" runs these files only
#                 (tests/test_cli.c, ...), ONLY=interrupt the tests with that in their name, JOBS=4 files at a time;
#                 COVERAGE=1 counts lines
# make test-gpu   the tests that need a GPU, alone; make test-gpu-plain, sanitize-gpu and compare-gpu (beside PyTorch)
#                 go further
# make test-gpus  what needs several: parts of a model, and processes that share one (mpirun)
# make lib        the attention kernels alone: build/libattention.so (model/attention/attention.h is its interface)
# make bench      measures the GPU on weights of LLaMA 3.1 8B's shape, made from a seed (without a GPU, the CPU on
#                 3.2 1B's)
# make bench-cpu  measures the CPU engine on 3.2 1B's shape, in both precisions and three types of weights, and on a
#                 small one
# make bench-tokenizer  encoding beside tiktoken and HuggingFace tokenizers; make check-tokenizer compares their ids on
#                 a million strings and more. They fetch both from PyPI, and need LLaMA 3's vocabulary (RANKS, a
#                 tokenizer.model)
# make check-added-tokens  how added tokens are found, beside HuggingFace tokenizers (from PyPI); make check-chat:
#                 conversations beside transformers' apply_chat_template, in published templates; make check-answers:
#                 repetition penalty and log-probabilities of prompts beside transformers (scripts/requirements.txt:
#                 torch, gigabytes)
# make check-perplexity  half windows beside llama.cpp's llama-perplexity, which it builds from PyPI's
#                 llama-cpp-python: some minutes
# make asan       the tests once more, under AddressSanitizer and UBSan
# make fuzz       the readers under libFuzzer (clang): FUZZ_SECONDS for each target, or FUZZ_RUNS; FUZZ names the
#                 targets; make fuzz-tokenizer does ten minutes of that one
# make lint       clang-tidy and cppcheck; what they are not asked is in .clang-tidy and tests/cppcheck.txt, with
#                 reasons
# make format     lays out C and CUDA as .clang-format says, with a clang-format from PyPI; make check-format only looks
# make coverage   how many lines of the CPU's sources the tests reach: make COVERAGE=1 test
# make valgrind   the reading of good and bad files under valgrind
# make all-archs  the program for every GPU that is supported
# make install    what make built to PREFIX/bin, its manual page, completions for bash, zsh and fish, and convert.py to
#                 PREFIX/share (PREFIX=/usr/local; DESTDIR before it); it compiles nothing. make uninstall removes them
# make help       this list
# make clean
#
# CUDA=0 leaves the CUDA Toolkit alone; CUDA_HOME says where it is. MPI=0 leaves MPI and NCCL alone, which come in
# together, beside CUDA; MPICC names Open MPI's mpicc, NCCL_HOME a folder with include/nccl.h and lib/libnccl.so.2.
# CUDA_ARCHS: GPUs to build for; newer ones compile what is for the newest of these when the program starts. CC,
# CPPFLAGS, CFLAGS and LDFLAGS are yours to add to.

# make's own default is cc, which not every machine with gcc has.
ifeq ($(origin CC),default)
CC := $(notdir $(firstword $(foreach name,gcc cc clang,$(shell command -v $(name) 2>/dev/null))))
endif
CUDA     ?= 1
MPI      ?= 1
BUILD    ?= build$(if $(COVERAGE),/coverage)
PROGRAM  ?= $(if $(COVERAGE),$(BUILD)/)llama
PREFIX   ?= /usr/local

# ---- what this machine has -------------------------------------------------------------------------------------------

# (lines are counted of the CPU's sources)
NVCC    := $(if $(filter 0,$(CUDA))$(COVERAGE),,$(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null)))
# Line editing in --chat: readline, libedit or none.
HASH    := \#
try_line = $(shell printf '$(HASH)include <stdio.h>\n$(HASH)include <$(1)>\nint main(void) { return !readline; }' | $(CC) $(CPPFLAGS) $(CFLAGS) -x c - -o /dev/null $(LDFLAGS) $(2) 2>/dev/null && echo yes)
LINE    := $(if $(call try_line,readline/readline.h,-lreadline),readline,$(if $(call try_line,editline/readline.h,-ledit),edit,none))
X86     := $(findstring x86_64,$(shell $(CC) -dumpmachine))

# GPUs to build for: this machine's, or where there is none an A100 (whose code runs on 86 and 89, too) and a Hopper.
ALL_ARCHS   := 80 86 89 90a 100 120
GPU_HERE    := $(if $(NVCC),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/\.//; s/^90$$/90a/'))
CUDA_ARCHS  ?= $(or $(GPU_HERE),80 90a)
# Code for each, and PTX of the newest, which the driver compiles on GPUs that are newer. (Hopper's own instructions,
# sm_90a, are for Hopper alone: its PTX is that of compute_90.)
ARCHS       := $(patsubst 90,90a,$(CUDA_ARCHS))
newest       = $(lastword $(shell printf '%s\n' $(subst f,,$(subst a,,$(1))) | sort -n))
gencode      = $(foreach arch,$(1),-gencode arch=compute_$(arch),code=sm_$(arch)) -gencode arch=compute_$(newest),code=compute_$(newest)
GENCODE     := $(if $(NVCC),$(call gencode,$(ARCHS)))
CUDA_ROOT   := $(abspath $(dir $(realpath $(NVCC)))..)
CUDA_LDFLAGS := $(if $(NVCC),-L$(CUDA_ROOT)/lib64 -Xlinker -rpath -Xlinker $(CUDA_ROOT)/lib64 -lcublas -lcublasLt -lcudart -lstdc++)
CUDA_CFLAGS := $(if $(NVCC),-DLLAMA_CUDA)
# Several processes, a GPU each: MPI and NCCL, or neither. (Tests need MPI alone.)
MPICC       ?= $(shell command -v mpicc 2>/dev/null)
try         = $(shell printf '$(HASH)include <$(1)>\nint main(void) { return 0; }' | $(CC) $(CPPFLAGS) $(CFLAGS) -x c - -o /dev/null $(LDFLAGS) $(2) 2>/dev/null && echo yes)
mpi_flags   = $(if $(filter 0,$(MPI)),,$(if $(MPICC),$(shell $(MPICC) --showme:$(1) 2>/dev/null)))
MPI_CFLAGS  := $(call mpi_flags,compile)
MPI_LDFLAGS := $(call mpi_flags,link)
HAVE_MPI    := $(if $(MPI_LDFLAGS),$(call try,mpi.h,$(MPI_CFLAGS) $(MPI_LDFLAGS)))
NCCL_CFLAGS := $(if $(NCCL_HOME),-I$(NCCL_HOME)/include)
NCCL_LDFLAGS := $(if $(NCCL_HOME),-L$(NCCL_HOME)/lib -Xlinker -rpath -Xlinker $(NCCL_HOME)/lib) -l:libnccl.so.2
PROCESSES   := $(if $(NVCC),$(if $(HAVE_MPI),$(call try,nccl.h,$(NCCL_CFLAGS) -I$(CUDA_ROOT)/include $(NCCL_LDFLAGS) $(CUDA_LDFLAGS))))
NCCL_IS     := $(if $(PROCESSES),NCCL $(shell printf '$(HASH)include <nccl.h>\nNCCL_MAJOR NCCL_MINOR NCCL_PATCH' | $(CC) $(NCCL_CFLAGS) -I$(CUDA_ROOT)/include -E -P -x c - 2>/dev/null | tail -n 1 | tr ' ' .))

# ---- flags -----------------------------------------------------------------------------------------------------------

# (a newer compiler may warn of what none did before: that ends a build in CI only, which sets WERROR)
WARNINGS := -Wall -Wextra $(if $(WERROR),-Werror)
# No contraction: a product and a sum are fused where the operations of model/cpu are compiled (OPS_C) and nowhere else,
# so that RoPE's frequencies, say, are the same on every machine.
COVERAGE_FLAGS := $(if $(COVERAGE),-g --coverage)
# Kernels count in memory: gcc unrolls no loop out of which it has moved a counter, and their vectors would be in
# memory, too, ten times as slow. (gcc 12 has this option.)
COVERAGE_KERNEL := $(if $(COVERAGE),$(shell $(CC) -fno-move-loop-stores -x c -c /dev/null -o /dev/null 2>/dev/null && echo -fno-move-loop-stores))
ALL_CFLAGS  := -std=gnu11 -O3 -ffp-contract=off $(WARNINGS) -pthread -MMD -MP $(CUDA_CFLAGS) $(COVERAGE_FLAGS) $(CPPFLAGS) $(CFLAGS)
ALL_LDFLAGS := -pthread $(COVERAGE_FLAGS) $(LDFLAGS) $(CUDA_LDFLAGS) $(if $(filter-out none,$(LINE)),-l$(LINE)) $(if $(PROCESSES),$(MPI_LDFLAGS) $(NCCL_LDFLAGS)) -lm
LINE_CFLAGS := $(if $(filter edit,$(LINE)),-DREADLINE_HEADER='<editline/readline.h>' -DHISTORY_HEADER='<editline/readline.h>' -DLINE_EDITOR='"libedit"' -DLINE_WIDE=true,\
                 -DREADLINE_HEADER='<readline/readline.h>' -DHISTORY_HEADER='<readline/history.h>' -DLINE_EDITOR='"readline"' -DLINE_WIDE=false)
# Position-independent, so that one object of the attention kernels is in the program and in their library.
NVCC_FLAGS   = -std=c++17 -O3 -Xfatbin -compress-all --threads 2 $(GENCODE) -I. $(if $(PROCESSES),$(NCCL_CFLAGS)) $(filter -D% -U% -I%,$(CPPFLAGS)) -Xcompiler -Wall,-Wextra,-fPIC
OPS_CFLAGS  := -ffp-contract=fast -Wno-psabi

# ---- sources ---------------------------------------------------------------------------------------------------------

# Every source under these folders, except a main of its own, the operations (compiled once for each instruction set)
# and what stands for another: ops_x86 or ops_other, line_readline or line_none, processes_mpi or processes_none.
SOURCES := $(sort $(wildcard $(foreach folder,cli tokenizer model,$(folder)/*.c $(folder)/*/*.c)))
OPS_C   := $(filter %/cpu/ops.c %/cpu/attention.c,$(SOURCES))
LIBRARY := $(filter-out cli/manual.c $(OPS_C) $(if $(X86),%/ops_other.c %/quant_scan_other.c,%/ops_x86.c %_avx512.c %_amx.c %/quant_scan_x86.c) \
             $(if $(filter none,$(LINE)),%/line_readline.c,%/line_none.c) $(if $(PROCESSES),%/processes_none.c,%/processes_mpi.c),$(SOURCES))
OPS     := $(foreach isa,portable $(if $(X86),avx2),$(OPS_C:%.c=$(BUILD)/%_$(isa).o))

# The GPU engines, where there is nvcc.
CUDA_LIBRARY := $(if $(NVCC),$(filter-out $(if $(PROCESSES),%/comm_none.cu,%/comm_nccl.cu),$(sort $(wildcard attention.cu model/*.cu model/*/*.cu))))
ATTENTION    := $(wildcard attention.cu model/attention/attention.cu)

LIBRARY_OBJECTS := $(CUDA_LIBRARY:%.cu=$(BUILD)/%.o) $(LIBRARY:%.c=$(BUILD)/%.o) $(OPS)
TESTS           := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
GPU_TESTS       := $(if $(NVCC),$(patsubst tests/%.cu,$(BUILD)/tests/%,$(wildcard tests/test_*.cu)))
SCRIPT_TESTS    := $(wildcard tests/test_*.sh tests/test_*.py)

.SECONDARY: # objects of tests stay
.PHONY: all all-archs help demo test test-gpu test-gpus test-gpu-plain sanitize-gpu compare-gpu lib install uninstall bench bench-cpu \
        bench-tokenizer check-tokenizer check-added-tokens check-chat check-answers check-perplexity asan lint coverage valgrind fuzz fuzz-build fuzz-tokenizer format check-format clean FORCE

all: $(PROGRAM) $(BUILD)/manual
	@echo "built $(PROGRAM), $(if $(NVCC),with its GPU engine for $(ARCHS) and newer ($(NVCC)),for the CPU only: $(if $(filter 0,$(CUDA))$(COVERAGE),CUDA=0,no nvcc in CUDA_HOME or PATH))"
	@echo "lines in --chat are edited by $(if $(filter none,$(LINE)),the terminal alone: libreadline-dev (Fedora: readline-devel) brings readline,$(if $(filter edit,$(LINE)),libedit,readline))"
	@echo "several processes (mpirun): $(or $(PROCESSES:yes=with $(NCCL_IS)),no: $(if $(filter 0,$(MPI)),MPI=0,$(if $(NVCC),libopenmpi-dev and libnccl-dev bring what it takes,they need CUDA)))"

all-archs:
	+@$(MAKE) CUDA_ARCHS="$(ALL_ARCHS)" all

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(PROGRAM): $(BUILD)/llama.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# Everything is built anew when the compiler or its flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CC) $(ALL_CFLAGS) $(KERNEL_CFLAGS) $(OPS_CFLAGS) $(ALL_LDFLAGS) $(NVCC) $(NVCC_FLAGS)' | cmp -s - $@ || \
	 echo '$(CC) $(ALL_CFLAGS) $(KERNEL_CFLAGS) $(OPS_CFLAGS) $(ALL_LDFLAGS) $(NVCC) $(NVCC_FLAGS)' > $@

# What --version says of the sources and of CUDA; compiled anew when it changes.
COMMIT  := $(shell git -C $(CURDIR) describe --always --dirty=+ --exclude='*' 2>/dev/null || echo unknown)
VERSION := $(shell cat VERSION)
CUDA_IS := $(if $(NVCC),CUDA $(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') for sm $(ARCHS) and newer,no CUDA)

$(BUILD)/version: FORCE
	@mkdir -p $(@D)
	@echo '$(VERSION) $(COMMIT) $(CUDA_IS)' | cmp -s - $@ || echo '$(VERSION) $(COMMIT) $(CUDA_IS)' > $@

$(BUILD)/cli/line_readline.o: cli/line_readline.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LINE_CFLAGS) -c $< -o $@

$(BUILD)/cli/version.o: cli/version.c $(BUILD)/flags $(BUILD)/version
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DVERSION='"$(VERSION)"' -DCOMMIT='"$(COMMIT)"' -DCUDA_IS='"$(CUDA_IS)"' -c $< -o $@

$(BUILD)/model/parallel/processes_mpi.o: model/parallel/processes_mpi.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(MPI_CFLAGS) -DNCCL_IS='"$(or $(NCCL_IS),no NCCL)"' -c $< -o $@

$(BUILD)/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@

# Engine fused is for Hopper and later.
$(foreach name,fused fused_shards wide packed_product prompt_product,$(BUILD)/model/cuda/$(name).o): private GENCODE := $(if $(NVCC),$(call gencode,$(or $(filter-out 80 86 87 89,$(ARCHS)),90a)))

$(BUILD)/model/cpu/%_avx512.o $(BUILD)/model/cpu/%_amx.o: private ALL_CFLAGS += $(COVERAGE_KERNEL) $(KERNEL_CFLAGS)

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -c $< -o $@

# Sources that are compiled once for each instruction set.
$(filter %_portable.o,$(OPS)): $(BUILD)/%_portable.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(OPS_CFLAGS) -DOPS_ISA=portable -DOPS_NAME='"portable"' -c $< -o $@

$(filter %_avx2.o,$(OPS)): $(BUILD)/%_avx2.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(OPS_CFLAGS) -mavx2 -mfma -DOPS_ISA=avx2 -DOPS_NAME='"AVX2"' -c $< -o $@

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# With MPI also where the program is built without it: a test of what processes say to each other needs no GPU.
WITH_MPI := $(if $(HAVE_MPI),$(patsubst %/processes_none.o,%/processes_mpi.o,$(LIBRARY_OBJECTS)),$(LIBRARY_OBJECTS))
$(BUILD)/tests/test_processes: $(BUILD)/tests/test_processes.o $(WITH_MPI) $(BUILD)/tests/llama-mpi
	$(CC) $(filter %.o,$^) -o $@ $(ALL_LDFLAGS) $(if $(HAVE_MPI),$(MPI_LDFLAGS))

$(BUILD)/tests/test_processes.o: tests/test_processes.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DMPIRUN='"$(if $(MPICC),$(dir $(MPICC)))mpirun"' -c $< -o $@

$(BUILD)/tests/llama-mpi: $(BUILD)/llama.o $(WITH_MPI)
	@mkdir -p $(@D)
	$(CC) $^ -o $@ $(ALL_LDFLAGS) $(if $(HAVE_MPI),$(MPI_LDFLAGS))

# What goes wrong in test_failures.
$(BUILD)/tests/inject.so: tests/inject.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O1 $(WARNINGS) -fPIC -shared $< -o $@ -ldl

lib: $(if $(NVCC),$(BUILD)/libattention.so)
	$(if $(NVCC),,$(error make lib needs nvcc: none in CUDA_HOME or PATH, or CUDA=0))

$(BUILD)/libattention.so: $(ATTENTION:%.cu=$(BUILD)/%.o)
	$(NVCC) -shared $^ -o $@

# ---- use -------------------------------------------------------------------------------------------------------------

$(BUILD)/manual: $(BUILD)/cli/manual.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# What is there is installed, and nothing is built: another user's make, or a later one, must not compile.
BIN  := $(DESTDIR)$(PREFIX)/bin
MAN  := $(DESTDIR)$(PREFIX)/share/man/man1
BASH := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSH  := $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISH := $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
# convert.py and the modules that it imports.
SHARE   := $(DESTDIR)$(PREFIX)/share/llama
CONVERT := $(addprefix scripts/,convert.py refusal.py checked_json.py model_file.py share_writer.py safetensors_reader.py weight_values.py hf_checkpoint.py \
             hf_quantised.py hf_tokenizer.py chat_template.py template_render.py template_reader.py template_expressions.py template_values.py)

install:
	@[ -x $(PROGRAM) ] && [ -x $(BUILD)/manual ] || { echo "make install: $(PROGRAM) is not built; run make first" >&2; exit 1; }
	install -d $(BIN) $(MAN) $(BASH) $(ZSH) $(FISH) $(SHARE)
	install $(PROGRAM) $(BIN)/llama
	$(abspath $(BUILD)/manual) > $(MAN)/llama.1
	$(abspath $(BUILD)/manual) bash > $(BASH)/llama
	$(abspath $(BUILD)/manual) zsh > $(ZSH)/_llama
	$(abspath $(BUILD)/manual) fish > $(FISH)/llama.fish
	chmod 644 $(MAN)/llama.1 $(BASH)/llama $(ZSH)/_llama $(FISH)/llama.fish
	install -m 644 $(CONVERT) $(SHARE)

uninstall:
	rm -f $(BIN)/llama $(MAN)/llama.1 $(BASH)/llama $(ZSH)/_llama $(FISH)/llama.fish $(CONVERT:scripts/%=$(SHARE)/%)
	rm -rf $(SHARE)/__pycache__
	[ ! -d $(SHARE) ] || rmdir --ignore-fail-on-non-empty $(SHARE)

demo: all
	./$(PROGRAM) model/stories.bin -p "Once upon a time" --echo -n 200 --temp 0.7 --top-p 0.9
	@echo

# The test files to run: all, or those of TEST. Files that use a GPU run one after the other, before the rest; of the
# rest those that take long come first.
LONG     := processes signals speculate reference chat_template convert
ALL_FILES := $(GPU_TESTS) $(TESTS) $(SCRIPT_TESTS)
files_of = $(filter %/test_$(1) %/test_$(1).sh %/test_$(1).py,$(ALL_FILES))
CHOSEN   := $(if $(TEST),$(foreach name,$(TEST),$(or $(call files_of,$(name)),$(error TEST: there is no test file of the name $(name); there are: \
              $(sort $(patsubst test_%,%,$(basename $(notdir $(ALL_FILES)))))))),$(ALL_FILES))
ON_GPU   := $(filter $(GPU_TESTS) tests/test_engine_gpu.sh tests/test_mpi_gpu.sh,$(CHOSEN))
LONGEST  := $(filter $(foreach name,$(LONG),$(call files_of,$(name))),$(CHOSEN))

# Thousands of runs go wrong on purpose where a run starts in milliseconds: without CUDA's libraries.
test: all $(filter $(BUILD)/%,$(CHOSEN)) $(BUILD)/tests/inject.so
	@$(if $(COVERAGE),find $(BUILD) -name '*.gcda' -delete)
	@INJECT_LIBRARY=$(if $(NVCC),,$(BUILD)/tests/inject.so) SIGNALS=$${SIGNALS:-$(if $(NVCC),200,$(if $(COVERAGE),40,1000))} \
	 $(if $(COVERAGE),OMP_NUM_THREADS=1 COVERAGE=1) LLAMA=./$(PROGRAM) sh tests/run.sh $(ON_GPU) -- $(LONGEST) $(filter-out $(ON_GPU) $(LONGEST),$(CHOSEN)) \
	 $(if $(COVERAGE),; status=$$?; sh tests/coverage.sh $(BUILD) > $(BUILD)/summary; cat $(BUILD)/summary >&2; exit $$status)

test-gpu: all $(GPU_TESTS)
	@LLAMA=./$(PROGRAM) sh tests/run.sh $(GPU_TESTS) tests/test_engine_gpu.sh --

SHARD_TESTS := $(addprefix $(BUILD)/tests/,test_shards_cuda test_candidates_cuda)
test-gpus: all $(SHARD_TESTS)
	@LLAMA=./$(PROGRAM) ONLY=shards sh tests/run.sh $(SHARD_TESTS) --
	@LLAMA=./$(PROGRAM) sh tests/run.sh tests/test_mpi_gpu.sh --

# The attention of GPUs other than Hopper, on whichever is here: code for compute_80, which the driver compiles when the
# program starts.
$(BUILD)/tests/test_attention_plain: tests/test_attention.cu $(ATTENTION) $(BUILD)/libattention.so
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 -I. -gencode arch=compute_80,code=compute_80 $(filter %.cu,$^) -o $@

test-gpu-plain: $(BUILD)/tests/test_attention_plain
	@sh tests/run.sh $<

sanitize-gpu: all $(GPU_TESTS)
	for tool in memcheck racecheck initcheck synccheck; do \
	  echo "== $$tool" && compute-sanitizer --tool $$tool --error-exitcode 9 $(BUILD)/tests/test_attention --small > $(BUILD)/$$tool.log 2>&1; \
	  status=$$?; tail -n 2 $(BUILD)/$$tool.log; [ $$status -eq 0 ] || exit 1; done
	compute-sanitizer --tool memcheck --error-exitcode 9 ./$(PROGRAM) model/stories.bin -p "Once" -n 20 --engine cublas
	compute-sanitizer --tool memcheck --error-exitcode 9 ./$(PROGRAM) model/stories.bin -p "Once" -n 20 --engine cublas --temp 0.8 --top-p 0.9

# Needs Python with torch and transformers.
compare-gpu: lib $(BUILD)/tests/read_ceiling
	python3 scripts/check_attention_torch.py --csv $(BUILD)/attention.csv --plot $(BUILD)/attention.png
	python3 scripts/hf_attention.py

bench: all
	./$(PROGRAM) --synthetic $(if $(GPU_HERE),llama-3.1-8b,llama-3.2-1b) --bench

bench-cpu: all
	./$(PROGRAM) --synthetic llama-3.2-1b --bench --engine cpu
	./$(PROGRAM) --synthetic llama-3.2-1b --bench --engine cpu --precision bf16
	for type in int8:32 int4:32; do for precision in f32 bf16; do \
	  ./$(PROGRAM) --synthetic llama-3.2-1b --weights $$type --bench --engine cpu --precision $$precision -c 128 || exit; done; done
	./$(PROGRAM) --synthetic smollm2-135m --bench --engine cpu -c 512

# ---- the tokenizer beside its peers ----------------------------------------------------------------------------------

RANKS        ?= ../shared/tokenizer/tokenizer.model
VENV         := build/venv-tokenizer
LLAMA3_VOCAB := $(BUILD)/llama3-vocab.bin

$(VENV)/installed: scripts/requirements-tokenizer.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

$(LLAMA3_VOCAB): $(RANKS) $(CONVERT)
	@mkdir -p $(@D)
	python3 scripts/convert.py --vocab-only $< $@

bench-tokenizer: $(BUILD)/tests/bench_tokenizer $(LLAMA3_VOCAB) $(VENV)/installed
	$(VENV)/bin/python scripts/bench_tokenizer.py --ranks $(RANKS) --model $(LLAMA3_VOCAB) --program $< --csv $(BUILD)/bench-tokenizer.csv

check-tokenizer: $(PROGRAM) $(LLAMA3_VOCAB) $(VENV)/installed
	$(VENV)/bin/python scripts/gen_unicode.py | cmp - tokenizer/unicode_tables.h
	$(VENV)/bin/python scripts/check_tokenizer.py --ranks $(RANKS) --model $(LLAMA3_VOCAB) --program ./$(PROGRAM)

# Open MPI and NCCL from PyPI, where the system has none: MPICC=$(PROCESSES_VENV)/bin/mpicc
PROCESSES_VENV := build/venv-processes

$(PROCESSES_VENV)/installed: scripts/requirements-processes.txt
	python3 -m venv $(PROCESSES_VENV)
	$(PROCESSES_VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

CHAT_VENV := build/venv-chat

$(CHAT_VENV)/installed: scripts/requirements-chat.txt
	python3 -m venv $(CHAT_VENV)
	$(CHAT_VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

check-added-tokens: $(PROGRAM) $(CHAT_VENV)/installed
	$(CHAT_VENV)/bin/python scripts/check_added_tokens.py --program ./$(PROGRAM)

check-chat: $(PROGRAM) $(CHAT_VENV)/installed
	$(CHAT_VENV)/bin/python scripts/check_chat.py --program ./$(PROGRAM) -n 50

HF_VENV := build/venv-hf

$(HF_VENV)/installed: scripts/requirements.txt
	python3 -m venv $(HF_VENV)
	$(HF_VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

check-answers: $(PROGRAM) $(HF_VENV)/installed
	$(HF_VENV)/bin/python scripts/check_answers.py --program ./$(PROGRAM)

# ---- perplexity beside llama.cpp's -----------------------------------------------------------------------------------

PERPLEXITY_VENV := build/venv-perplexity

$(PERPLEXITY_VENV)/installed: scripts/requirements-perplexity.txt
	python3 -m venv $(PERPLEXITY_VENV)
	$(PERPLEXITY_VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

check-perplexity: $(PROGRAM) $(PERPLEXITY_VENV)/installed
	$(PERPLEXITY_VENV)/bin/python scripts/check_perplexity.py --program ./$(PROGRAM)

# Kernels keep their vectors in registers: their loops over a few rows are unrolled, and no scope of a variable is
# marked, which would give it an address. What is left out besides tells of pointers before they are used; each access
# of heap, globals and stack is checked, and the index of each array.
ASAN_KERNEL := -O3 -fno-sanitize-address-use-after-scope -fno-sanitize=null,object-size,pointer-overflow

# All but what has no C in it, needs a GPU or does without sanitizers.
asan:
	+@SANITIZERS=1 SIGNALS=60 $(MAKE) BUILD=build/asan PROGRAM=build/asan/llama CUDA=0 CFLAGS="$(CFLAGS) -g -O2 -fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS="$(LDFLAGS) -fsanitize=address,undefined" \
	 KERNEL_CFLAGS="$(ASAN_KERNEL)" OPS_CFLAGS="$(OPS_CFLAGS) $(ASAN_KERNEL)" \
	 TEST="$(filter-out convert chat_template scripts engine_gpu failures,$(or $(TEST),$(sort $(patsubst test_%,%,$(basename $(notdir $(TESTS) $(SCRIPT_TESTS)))))))" test

LINTED      := llama.c cli/manual.c $(LIBRARY) $(OPS_C)
LINT_DEFINE := -DVERSION='""' -DCOMMIT='""' -DCUDA_IS='""' -DOPS_ISA=portable -DOPS_NAME='""' $(LINE_CFLAGS)

lint: $(LINTED:%=tidy/%)
	cppcheck --quiet -j2 --error-exitcode=1 --enable=warning,performance,portability --std=c11 --suppressions-list=tests/cppcheck.txt $(LINT_DEFINE) $(LINTED)

tidy/%: % FORCE
	clang-tidy --quiet $< -- -std=gnu11 $(LINT_DEFINE)

# ---- layout ----------------------------------------------------------------------------------------------------------
# The version counts: another lays out some lines another way. Tables that a script wrote stay as it wrote them.

FORMATTED := $(filter-out tokenizer/unicode_tables.h,$(wildcard $(foreach folder,. cli tokenizer model model/* tests,$(addprefix $(folder)/,*.c *.h *.cu *.cuh))))
FORMAT    := build/venv-format

$(FORMAT)/installed: scripts/requirements-format.txt
	python3 -m venv $(FORMAT)
	$(FORMAT)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

format: $(FORMAT)/installed
	$(FORMAT)/bin/clang-format -i $(FORMATTED)

check-format: $(FORMAT)/installed
	$(FORMAT)/bin/clang-format --dry-run --Werror $(FORMATTED)

coverage:
	+@$(MAKE) COVERAGE=1 test

VALGRIND_TESTS := bad_input cli
VALGRIND_UNITS := safetensors chat kv_cache

# Of the comparisons those of a model of one layer: under valgrind the story model's take minutes each.
valgrind: all $(patsubst %,$(BUILD)/tests/test_%,$(VALGRIND_UNITS) $(VALGRIND_TESTS) compare)
	@for unit in $(VALGRIND_UNITS); do valgrind -q --error-exitcode=99 $(BUILD)/tests/test_$$unit || exit 1; done
	@LLAMA=tests/valgrind.sh PROGRAM=./$(PROGRAM) $(BUILD)/tests/test_compare --script
	@LLAMA=tests/valgrind.sh PROGRAM=./$(PROGRAM) sh tests/run.sh $(VALGRIND_TESTS:%=$(BUILD)/tests/test_%)

# ---- fuzzing ---------------------------------------------------------------------------------------------------------
# libFuzzer with ASan and UBSan. What it learns is kept in build/fuzz/corpus; tests/fuzz has the seeds.

FUZZ         ?= $(sort $(patsubst tests/fuzz_%.c,%,$(wildcard tests/fuzz_*.c)))
FUZZ_SECONDS ?= 60
FUZZ_RUNS    ?= -1
FUZZ_BUILD   := build/fuzz
# (Arithmetic has no branches to find, and would take three times as long. No contraction there either: at -O1 clang
# fuses a product and a sum here and not there, so that a row would not have the bits that it has alone. Kernels of
# vectors, which tests run under gcc's sanitizers, would take clang minutes to compile.)
FUZZ_MAKE    := $(MAKE) CC=clang CUDA=0 BUILD=$(FUZZ_BUILD) CFLAGS="-g -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all" \
                OPS_CFLAGS="$(OPS_CFLAGS) -ffp-contract=off -fno-sanitize=fuzzer-no-link" \
                KERNEL_CFLAGS=-fno-sanitize=fuzzer-no-link,address,undefined

fuzz: $(FUZZ:%=fuzz/%)

fuzz-build:
	+@$(FUZZ_MAKE) LDFLAGS="-fsanitize=fuzzer,address,undefined" $(FUZZ:%=$(FUZZ_BUILD)/tests/fuzz_%)

fuzz/%: fuzz-build FORCE
	@mkdir -p $(FUZZ_BUILD)/corpus/$*
	@$(FUZZ_BUILD)/tests/fuzz_$* -max_total_time=$(if $(filter -1,$(FUZZ_RUNS)),$(FUZZ_SECONDS),0) -runs=$(FUZZ_RUNS) -max_len=2048 -timeout=10 \
	   -rss_limit_mb=2048 $(patsubst %,-dict=%,$(wildcard tests/fuzz/$*.dict)) -artifact_prefix=$(FUZZ_BUILD)/$*- -print_final_stats=1 \
	   $(FUZZ_BUILD)/corpus/$* tests/fuzz/$* > $(FUZZ_BUILD)/$*.log 2>&1; \
	 status=$$?; echo "== fuzz $*"; grep -E 'number_of_executed_units|average_exec' $(FUZZ_BUILD)/$*.log; \
	 [ $$status -eq 0 ] || { tail -n 40 $(FUZZ_BUILD)/$*.log; exit 1; }

fuzz-tokenizer:
	+@$(MAKE) fuzz FUZZ=tokenizer FUZZ_SECONDS=$(if $(filter file,$(origin FUZZ_SECONDS)),600,$(FUZZ_SECONDS))

clean:
	rm -rf build llama

-include $(LIBRARY_OBJECTS:.o=.d) $(BUILD)/llama.d $(BUILD)/cli/manual.d $(TESTS:=.d) $(GPU_TESTS:=.d) $(wildcard $(BUILD)/tests/fuzz_*.d) \
         $(BUILD)/tests/bench_tokenizer.d $(BUILD)/tests/bench_speculate.d $(BUILD)/tests/read_ceiling.d
