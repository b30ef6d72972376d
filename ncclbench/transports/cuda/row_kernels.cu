// Work on rows between all-to-alls, one launch a phase: see RowKernel for what each does.
//
// Everything here is bound by memory. A row is read and written in whole words of up to 16 bytes; a block is
// (threads along a row) x (rows), so that narrow rows, such as entries of 8 bytes, fill a warp too. Each thread has
// several reads under way before it writes. Results have the bits that NumPy gives.
//
// Only plain C++, so that tests can play it on a host too: no shared memory, no synchronisation.

typedef unsigned char byte;
typedef unsigned short half_word;
typedef unsigned int word;
typedef unsigned long long double_word;

#define EACH _Pragma("unroll")
// Reads that a thread has under way.
#define AHEAD 4

// Arithmetic, spelled so that no compiler flag changes it: CuPy compiles everything with -ftz=true, which would flush
// denormals, and a product and a sum would become one operation with one rounding.

__device__ __forceinline__ float times(float a, float b) {
#ifdef __CUDA_ARCH__
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#else
    return a * b;
#endif
}

__device__ __forceinline__ float plus(float a, float b) {
#ifdef __CUDA_ARCH__
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
#else
    return a + b;
#endif
}

// Bits of numbers.

__device__ __forceinline__ float low_bf16(word pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(word pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// To the nearest, ties to even; the result is the upper half of the word. No NaN comes here.
__device__ __forceinline__ word rounded(float value) {
    word bits = __float_as_uint(value);
    return bits + ((bits >> 16) & 1u) + 0x7FFFu;
}

__device__ __forceinline__ word bf16_pair(float low, float high) {
    return (rounded(low) >> 16) | (rounded(high) & 0xFFFF0000u);
}

// e4m3 of 4 exponent bits: shifted into a float's place it is 2^-120 times too small, denormals included.
__device__ __forceinline__ float from_e4m3(word code) {
    word magnitude = code & 0x7Fu;
    if (magnitude == 0x7Fu) return __uint_as_float(0x7FC00000u);
    return times(__uint_as_float(((code & 0x80u) << 24) | (magnitude << 20)), __uint_as_float(0x7B800000u));  // 2^120
}

__device__ __forceinline__ float from_e2m1(word code) {
    return times(__uint_as_float(((code & 8u) << 28) | ((code & 7u) << 22)), __uint_as_float(0x7E800000u));  // 2^126
}

__device__ __forceinline__ float from_e8m0(word code) {
    if (code == 255u) return __uint_as_float(0x7FC00000u);
    return __uint_as_float(code ? code << 23 : 0x00400000u);  // 2^-127 is a denormal
}

// take: row i of `target` is row index[i] of `source`, zeros where that is -1.

template <typename Word>
__device__ __forceinline__ void take_row(Word* target, const Word* source, int words) {
    for (int first = threadIdx.x; first < words; first += AHEAD * blockDim.x) {
        Word held[AHEAD];
        EACH for (int k = 0; k < AHEAD; ++k) {
            int column = first + k * (int)blockDim.x;
            if (source && column < words) held[k] = source[column];
            else held[k] = Word();
        }
        EACH for (int k = 0; k < AHEAD; ++k) {
            int column = first + k * (int)blockDim.x;
            if (column < words) target[column] = held[k];
        }
    }
}

#define TAKE(NAME, WORD)                                                                                       \
    extern "C" __global__ void NAME(WORD* target, const WORD* source, const int* index, int rows, int words) { \
        int row = blockIdx.x * blockDim.y + threadIdx.y;                                                       \
        if (row >= rows) return;                                                                               \
        int from = index[row];                                                                                 \
        const WORD* read = from < 0 ? (const WORD*)0 : source + (long long)from * words;                       \
        take_row<WORD>(target + (long long)row * words, read, words);                                       \
    }

TAKE(take_16, uint4)
TAKE(take_8, double_word)
TAKE(take_4, word)
TAKE(take_2, half_word)
TAKE(take_1, byte)

// sum: row i of `target` is the sum over j of weight[i, j] x row index[i, j] of `source`, in float32 and in order of j,
// from +0 on. Both are bfloat16, eight a word. A weight is the second float of an entry of 8 bytes; none at all are 1.

struct Eight {
    float at[8];
};

__device__ __forceinline__ void add(Eight& total, const uint4& bits, bool weighted, float weight) {
    word pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    EACH for (int p = 0; p < 4; ++p) {
        float low = low_bf16(pairs[p]), high = high_bf16(pairs[p]);
        if (weighted) {
            low = times(low, weight);
            high = times(high, weight);
        }
        total.at[2 * p] = plus(total.at[2 * p], low);
        total.at[2 * p + 1] = plus(total.at[2 * p + 1], high);
    }
}

__device__ __forceinline__ uint4 as_bf16(const Eight& values) {
    uint4 bits;
    bits.x = bf16_pair(values.at[0], values.at[1]);
    bits.y = bf16_pair(values.at[2], values.at[3]);
    bits.z = bf16_pair(values.at[4], values.at[5]);
    bits.w = bf16_pair(values.at[6], values.at[7]);
    return bits;
}

template <bool WEIGHTED>
__device__ __forceinline__ void sum_row(
    uint4* target, const uint4* source, const int* index, const float* entries, int terms, int words
) {
    for (int column = threadIdx.x; column < words; column += blockDim.x) {
        Eight total = {{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
        for (int first = 0; first < terms; first += AHEAD) {
            uint4 held[AHEAD];
            bool there[AHEAD];
            EACH for (int k = 0; k < AHEAD; ++k) {
                int from = first + k < terms ? index[first + k] : -1;
                there[k] = from >= 0;
                if (there[k]) held[k] = source[(long long)from * words + column];
            }
            EACH for (int k = 0; k < AHEAD; ++k)
                if (there[k]) add(total, held[k], WEIGHTED, WEIGHTED ? entries[2 * (first + k) + 1] : 1.f);
        }
        target[column] = as_bf16(total);
    }
}

extern "C" __global__ void sum_plain(
    uint4* target, const uint4* source, const int* index, int rows, int terms, int words
) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    sum_row<false>(
        target + (long long)row * words, source, index + (long long)row * terms, (const float*)0, terms, words
    );
}

extern "C" __global__ void sum_weighted(
    uint4* target, const uint4* source, const int* index, const float* entries, int rows, int terms, int words
) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const float* own = entries + (long long)row * terms * 2;
    sum_row<true>(target + (long long)row * words, source, index + (long long)row * terms, own, terms, words);
}

// scale: row i of `target` is row index[i] of the payload, decoded, times factor[i], as bfloat16. A thread decodes
// eight elements at a time; they share a block's scale, since blocks are of 16 elements and more. Rows that are no
// whole number of such words, with an odd number of scales at their ends, are read by bytes.

struct Bf16 {
    enum { BYTES = 16 };
    static __device__ __forceinline__ uint4 load(const byte* at, bool) { return *(const uint4*)at; }
    static __device__ __forceinline__ Eight decode(const uint4& bits) {
        Eight values = {{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
        word pairs[4] = {bits.x, bits.y, bits.z, bits.w};
        EACH for (int p = 0; p < 4; ++p) {
            values.at[2 * p] = low_bf16(pairs[p]);
            values.at[2 * p + 1] = high_bf16(pairs[p]);
        }
        return values;
    }
};

__device__ __forceinline__ word four_bytes(const byte* at) {
    return at[0] | (word)at[1] << 8 | (word)at[2] << 16 | (word)at[3] << 24;
}

struct E4m3 {
    enum { BYTES = 8 };
    static __device__ __forceinline__ uint2 load(const byte* at, bool whole) {
        if (whole) return *(const uint2*)at;
        uint2 bits;
        bits.x = four_bytes(at);
        bits.y = four_bytes(at + 4);
        return bits;
    }
    static __device__ __forceinline__ Eight decode(const uint2& bits) {
        Eight values;
        EACH for (int k = 0; k < 4; ++k) {
            values.at[k] = from_e4m3(bits.x >> (8 * k) & 255u);
            values.at[4 + k] = from_e4m3(bits.y >> (8 * k) & 255u);
        }
        return values;
    }
};

struct E2m1 {
    enum { BYTES = 4 };
    static __device__ __forceinline__ word load(const byte* at, bool whole) {
        return whole ? *(const word*)at : four_bytes(at);
    }
    static __device__ __forceinline__ Eight decode(word bits) {
        Eight values;
        EACH for (int k = 0; k < 8; ++k) values.at[k] = from_e2m1(bits >> (4 * k) & 15u);  // the low half first
        return values;
    }
};

struct NoScale {
    static __device__ __forceinline__ float of(const byte*, int) { return 1.f; }
};
struct Fp32Scale {
    // Rows with such scales are whole words long.
    static __device__ __forceinline__ float of(const byte* scales, int number) { return ((const float*)scales)[number]; }
};
struct E8m0Scale {
    static __device__ __forceinline__ float of(const byte* scales, int number) { return from_e8m0(scales[number]); }
};
struct E4m3Scale {
    static __device__ __forceinline__ float of(const byte* scales, int number) { return from_e4m3(scales[number]); }
};

template <typename Element, typename Scale, int BLOCK>
__device__ __forceinline__ void scale_row(
    uint4* target, const byte* payload, const byte* scales, float factor, int words, bool whole
) {
    for (int first = threadIdx.x; first < words; first += AHEAD * blockDim.x) {
        decltype(Element::load(payload, whole)) held[AHEAD];
        float scale[AHEAD];
        EACH for (int k = 0; k < AHEAD; ++k) {
            int column = first + k * (int)blockDim.x;
            if (column < words) {
                held[k] = Element::load(payload + (long long)column * Element::BYTES, whole);
                scale[k] = Scale::of(scales, BLOCK ? column * 8 / (BLOCK ? BLOCK : 1) : 0);
            }
        }
        EACH for (int k = 0; k < AHEAD; ++k) {
            int column = first + k * (int)blockDim.x;
            if (column < words) {
                Eight values = Element::decode(held[k]);
                EACH for (int e = 0; e < 8; ++e) {
                    float value = values.at[e];
                    if (BLOCK) value = times(value, scale[k]);
                    values.at[e] = times(value, factor);
                }
                target[column] = as_bf16(values);
            }
        }
    }
}

#define SCALE(NAME, ELEMENT, SCALES, BLOCK)                                                                           \
    extern "C" __global__ void NAME(                                                                                  \
        uint4* target, const byte* payload, const byte* scales, const int* index, const float* factors, int rows,     \
        int words, long long payload_row, long long scales_row, int whole                                             \
    ) {                                                                                                               \
        int row = blockIdx.x * blockDim.y + threadIdx.y;                                                              \
        if (row >= rows) return;                                                                                      \
        long long from = index[row];                                                                                  \
        scale_row<ELEMENT, SCALES, BLOCK>(                                                                            \
            target + (long long)row * words, payload + from * payload_row, scales + from * scales_row, factors[row],  \
            words, whole != 0                                                                                         \
        );                                                                                                            \
    }

SCALE(scale_bf16, Bf16, NoScale, 0)
SCALE(scale_fp8, E4m3, Fp32Scale, 128)
SCALE(scale_mxfp8, E4m3, E8m0Scale, 32)
SCALE(scale_nvfp4, E2m1, E4m3Scale, 16)
