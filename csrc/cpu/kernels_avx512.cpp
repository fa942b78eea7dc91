// x86-64 with AVX-512 F, BW, DQ and VL: 16 accumulators hide the latency of two FMA units.
#define MNP_ISA avx512
#define MNP_VEC_BYTES 64
#define MNP_ROWS 8
#include "isa.inl"
