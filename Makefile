# make            builds ./llama
# make demo       builds it and tells a story with the model that ships here
# make test       builds and runs every test that this machine can run
# make bench-cpu  measures the CPU engine on weights of LLaMA 3.2 1B's shape, made from a seed
# make asan       the tests once more, under AddressSanitizer and UBSan
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

# ---- what this machine has ------------------------------------------------------------------------------------------

NVCC    := $(if $(filter 0,$(CUDA)),,$(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null)))
OPENMP  := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
X86     := $(findstring x86_64,$(shell $(CC) -dumpmachine))

# ---- flags ----------------------------------------------------------------------------------------------------------

WARNINGS := -Wall -Wextra -Werror
# No contraction: a product and a sum are fused where ops_cpu.c is compiled and nowhere else, so that RoPE's frequencies,
# say, are the same on every machine.
ALL_CFLAGS  := -std=gnu11 -O3 -ffp-contract=off $(WARNINGS) $(OPENMP) -MMD -MP $(CFLAGS)
ALL_LDFLAGS := $(OPENMP) $(LDFLAGS) -lm
OPS_CFLAGS  := -ffp-contract=fast -Wno-psabi

# ---- sources --------------------------------------------------------------------------------------------------------

LIBRARY := model/bench.c model/checkpoint.c model/compare.c model/error.c model/forward_cpu.c model/json.c model/model.c \
           model/safetensors.c model/sampler.c tokenizer/bpe.c tokenizer/split.c tokenizer/tokenizer.c
LIBRARY += $(if $(X86),model/ops_x86.c,model/ops_other.c)
OPS     := portable $(if $(X86),avx2)

LIBRARY_OBJECTS := $(LIBRARY:%.c=$(BUILD)/%.o) $(OPS:%=$(BUILD)/model/ops_%.o)
TESTS           := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))

.SECONDARY: # objects of tests stay
.PHONY: all demo test bench-cpu asan clean FORCE

all: $(PROGRAM)
	@echo "built $(PROGRAM), $(if $(NVCC),for the CPU: there is no GPU engine yet (nvcc: $(NVCC)),for the CPU only: $(if $(filter 0,$(CUDA)),CUDA=0,no nvcc in CUDA_HOME or PATH))"

$(PROGRAM): $(BUILD)/llama.o $(LIBRARY_OBJECTS)
	$(CC) $^ -o $@ $(ALL_LDFLAGS)

# Everything is built anew when the compiler or its flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CC) $(ALL_CFLAGS) $(ALL_LDFLAGS)' | cmp -s - $@ || echo '$(CC) $(ALL_CFLAGS) $(ALL_LDFLAGS)' > $@

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

# ---- use ------------------------------------------------------------------------------------------------------------

demo: all
	./$(PROGRAM) model/stories.bin -p "Once upon a time" --echo -n 200 --temp 0.7 --top-p 0.9
	@echo

test: all $(TESTS)
	@LLAMA=./$(PROGRAM) BUILD=$(BUILD) sh tests/run.sh

bench-cpu: all
	./$(PROGRAM) --synthetic llama-3.2-1b --bench --engine cpu

asan:
	SANITIZERS=1 $(MAKE) BUILD=build/asan PROGRAM=build/asan/llama CUDA=0 CFLAGS="$(CFLAGS) -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS="$(LDFLAGS) -fsanitize=address,undefined" test

clean:
	rm -rf build llama

-include $(LIBRARY_OBJECTS:.o=.d) $(BUILD)/llama.d $(TESTS:=.d)
