// x86-64 with AVX-512 F, BW, DQ and VL: 24 accumulators of the 32 vector registers.
#define MNP_ISA avx512
#define MNP_VEC_BYTES 64
#define MNP_ROWS 12
#include "isa.inl"
