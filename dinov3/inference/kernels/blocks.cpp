// The blocks of a frozen ViT on an x86 CPU: norm, qkv, RoPE, attention, projection, FFN, in float32, bfloat16 or int8.
//
// Built once for each level by `__init__.py`: compiled for AVX2, AVX-512 or AMX, with its instructions for bf16 (else integers
// of 16 bits stand for them) and VNNI (else int8 is computed in 16 bits).
//
// One layout serves all products C[rows, columns] = A · B. An operand is a row of tiles of 1 kB, 16 lines of 64 bytes; a
// group is 4 bytes along k: 1 float, 2 bf16 or int16, 4 int8. A tile of A: its lines are 16 rows, each with 16 groups. A tile of B:
// its lines are 16 groups, each of 16 columns. AMX multiplies such tiles; vectors take a group of A, broadcast, times a
// line of B. Tile (i, l) of a matrix with L tiles along k stands at i·L + l, with its planes side by side (see Split).

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

// ---- vectors of floats ----------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int TILE = 1024;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

inline vf load(const float *p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return x - vf{}; }
#ifdef __AVX512F__
inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
inline float sum(vf v) { float s = 0; for (int i = 0; i < W; i++) s += v[i]; return s; }
inline float largest(vf v) { float s = v[0]; for (int i = 1; i < W; i++) s = std::max(s, v[i]); return s; }
#endif

// 1/x; relative error 1e-7
inline vf reciprocal(vf x) {
#ifdef __AVX512F__
    const vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

constexpr float LOG2E = 1.44269504f;

// 2^x for x up to 127; relative error 1e-7, or 1e-4 for what is rounded to bf16
template <bool rough> inline vf power(vf x) {
#ifdef __AVX512F__
    const vf r = (vf)_mm512_reduce_ps((__m512)x, 8), n = x - r;  // r = x - the nearest integer
#else
    x = larger(x, all(-126.0f));
    const vf shifted = x + 12582912.0f;  // 1.5 · 2^23: the integer stands in the low bits
    const vf n = shifted - 12582912.0f, r = x - n;
#endif
    vf p = all(rough ? 5.51716685e-2f : 1.53458124e-4f);
    if constexpr (rough)
        for (float c : {2.42611125e-1f, 6.93260968e-1f, 9.99928057e-1f}) p = p * r + c;
    else
        for (float c : {1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f, 2.40226462e-1f, 6.93147182e-1f, 1.0f}) p = p * r + c;
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// x · (1 + erf(x/√2)) / 2, erf as a rational function; absolute error 3e-7, or 1e-4 and 7e-5·|x| for what is rounded
template <bool rough> inline vf gelu(vf x) {
    if constexpr (rough) {
        const vf z = smaller(larger(x, all(-3.75f)), all(3.75f)), s = z * z;
        vf p = all(3.24475273e-8f);
        for (float c : {-2.05581250e-6f, 5.63490612e-5f, -8.89112998e-4f, 9.10807122e-3f, -6.52523413e-2f, 3.98331523e-1f})
            p = p * s + c;
        return x * (z * p + 0.5f);
    }
    const vf z = smaller(larger(x * 0.70710678f, all(-4.0f)), all(4.0f)), s = z * z;
    vf p = all(-2.72614225801306e-10f), q = all(-1.45660718464996e-05f);
    for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                    -2.95459980854025e-03f, -1.60960333262415e-02f}) p = p * s + c;
    for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f}) q = q * s + c;
    return 0.5f * x * (1.0f + z * p * reciprocal(q));
}

inline vf silu(vf x) { return x * reciprocal(1.0f + power<false>(smaller(x * -LOG2E, all(126.0f)))); }

// ---- kinds of numbers in a product ----------------------------------------------------------------------------------

struct F32 {
    static constexpr int group = 1, planes = 1;
    using acc = vf;
    static acc dot(acc c, vf a, vf b) { return a * b + c; }
};
#ifdef __AVX512BF16__
struct Bf16 {
    static constexpr int group = 2, planes = 1;
    using acc = vf;
    static acc dot(acc c, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
// float32 as a sum of three bf16, which hold its 24 bits: six products of tiles, and what is left out is below 2^-24
struct Split : Bf16 {
    static constexpr int planes = 3;
};
#endif
struct I16 {  // 0 to 4095 × s16, for bf16 where the CPU has no products of it; `__init__.py` keeps the sums below 2^31
    static constexpr int group = 2, planes = 1, most = 4095;
    using acc = vi;
    static acc dot(acc c, vf a, vf b) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
        return (vi)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
#else
        return c + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
    }
};
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct I8 {  // u8 × s8
    static constexpr int group = 4, planes = 1, most = 255;
    using acc = vi;
    static acc dot(acc c, vf a, vf b) {
#ifdef __AVX512VNNI__
        return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
#endif
    }
};
#else
struct I8 : I16 {  // AVX2's products of bytes saturate
    static constexpr int most = 255;
};
#endif

template <class P> constexpr bool quantised = std::is_same_v<typename P::acc, vi>;
template <class P> constexpr int line = 16 * P::group;  // elements of a line along k
template <class P> constexpr bool rough = P::group > 1 && P::planes == 1;  // 8 bits at most are kept of a number

// W floats into row `row` of A at k
template <class P> inline void put(char *a, int L, int row, int k, vf v) {
    char *to = a + (size_t)((row / 16) * L + k / line<P>) * P::planes * TILE + row % 16 * 64 + k % line<P> * (4 / P::group);
    if constexpr (std::is_same_v<P, F32>) std::memcpy(to, &v, sizeof v);
#ifdef __AVX512BF16__
    else
        for (int plane = 0; plane < P::planes; plane++) {
            const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
            std::memcpy(to + plane * TILE, &half, 32);
            if (plane + 1 < P::planes) v -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
        }
#endif
}

// 2 W floats at k, a multiple of them
template <class P> inline void put_two(char *a, int L, int row, int k, vf first, vf second) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<P, Bf16>) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        std::memcpy(a + (size_t)(row / 16 * L + k / 32) * TILE + row % 16 * 64, &both, 64);
        return;
    }
#endif
    put<P>(a, L, row, k, first), put<P>(a, L, row, k + W, second);
}

// 4 W floats from 0 to P::most into row `row` of A at k, a multiple of them
template <class P> inline void put_integers(char *a, int L, int row, int k, const vf *v) {
    const auto at = [=](int k) {
        return a + (size_t)(row / 16 * L + k / line<P>) * TILE + row % 16 * 64 + k % line<P> * (4 / P::group);
    };
#ifdef __AVX512F__
    const auto two = [v](int i) {
        return _mm512_packus_epi32(_mm512_cvtps_epi32((__m512)v[i]), _mm512_cvtps_epi32((__m512)v[i + 1]));
    };
    __m512i numbers[2] = {two(0), two(2)};
    if constexpr (P::group == 4) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        numbers[0] = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(numbers[0], numbers[1]));
    } else
        for (__m512i &half : numbers) {
            const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            half = _mm512_permutexvar_epi64(order, _mm512_min_epu16(half, _mm512_set1_epi16(P::most)));
        }
#else
    const auto two = [v](int i) {
        return _mm256_packus_epi32(_mm256_cvtps_epi32((__m256)v[i]), _mm256_cvtps_epi32((__m256)v[i + 1]));
    };
    __m256i numbers[2] = {two(0), two(2)};
    if constexpr (P::group == 4) {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        numbers[0] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(numbers[0], numbers[1]), order);
    } else
        for (__m256i &half : numbers)
            half = _mm256_permute4x64_epi64(_mm256_min_epu16(half, _mm256_set1_epi16(P::most)), 0xd8);
#endif
    std::memcpy(at(k), numbers, 4 * W);
    if (P::group == 2) std::memcpy(at(k + 2 * W), numbers + 1, 4 * W);
}

// ---- products -------------------------------------------------------------------------------------------------------

// `ahead`: L tiles to bring into the second cache meanwhile, or null
template <class P, int R, int C>
inline void by_vectors(const char *a, const char *b, int L, float *out, int ldo, const char *ahead) {
    // loops with a pragma are unrolled, or GCC keeps the sums in memory before and after the loop over k
    constexpr int per_tile = 16 / W;
    typename P::acc c[R][C];
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) c[i][j] = typename P::acc{};
    for (int l = 0; l < L; l++)
        for (int g = 0; g < 16; g++) {
            if (ahead) _mm_prefetch(ahead + l * TILE + g * 64, _MM_HINT_T1);
            vf v[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; j++)
                v[j] = load((const float *)(b + (size_t)(j / per_tile * L + l) * TILE + g * 64) + j % per_tile * W);
#pragma GCC unroll 6
            for (int i = 0; i < R; i++) {
                int32_t bits;
                std::memcpy(&bits, a + (size_t)l * TILE + i * 64 + g * 4, 4);
                const vf x = (vf)(bits - vi{});
#pragma GCC unroll 4
                for (int j = 0; j < C; j++) c[i][j] = P::dot(c[i][j], x, v[j]);
            }
        }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) store(out + i * ldo + j * W, (vf)c[i][j]);
}

#ifdef __AMX_TILE__
template <class P, int R, int C> inline void by_tiles(const char *a, const char *b, int L, float *out, int ldo) {
    const size_t next = (size_t)L * P::planes * TILE;
    asm volatile("" ::: "memory");  // GCC does not know that tiles are read from memory
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int l = 0; l < L; l++)
        for (int i = 0; i < P::planes; i++) {
            const char *ta = a + (size_t)(l * P::planes + i) * TILE;
            _tile_loadd(4, ta, 64);
            if (R > 1) _tile_loadd(5, ta + next, 64);
            for (int j = 0; j < P::planes - i; j++) {
                const char *tb = b + (size_t)(l * P::planes + j) * TILE;
                _tile_loadd(6, tb, 64);
                if (C > 1) _tile_loadd(7, tb + next, 64);
                if constexpr (std::is_same_v<P, I8>) {
                    _tile_dpbusd(0, 4, 6);
                    if (C > 1) _tile_dpbusd(1, 4, 7);
                    if (R > 1) _tile_dpbusd(2, 5, 6);
                    if (R > 1 && C > 1) _tile_dpbusd(3, 5, 7);
                } else {
                    _tile_dpbf16ps(0, 4, 6);
                    if (C > 1) _tile_dpbf16ps(1, 4, 7);
                    if (R > 1) _tile_dpbf16ps(2, 5, 6);
                    if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
    _tile_stored(0, out, ldo * 4);
    if (C > 1) _tile_stored(1, out + 16, ldo * 4);
    if (R > 1) _tile_stored(2, out + 16 * ldo, ldo * 4);
    if (R > 1 && C > 1) _tile_stored(3, out + 16 * ldo + 16, ldo * 4);
}
#endif

// out [rows, 16·columns] = A · B over L tiles along k. int32 bits for integers. Rows of `out` up to the next 16 may be overwritten.
// Memory from `ahead` to `end` is wanted next.
template <class P>
void product(const char *a, const char *b, int L, int rows, int columns, float *out, int ldo,
             [[maybe_unused]] const char *ahead = nullptr, [[maybe_unused]] const char *end = nullptr) {
    const size_t next = (size_t)L * P::planes * TILE;
#ifdef __AMX_TILE__
    for (int j = 0; j < columns; j += 2)
        for (int i = 0; i * 16 < rows; i += 2) {
            const auto run = [&](auto kernel) { kernel(a + i * next, b + j * next, L, out + i * 16 * ldo + j * 16, ldo); };
            if (i * 16 + 16 < rows) j + 1 < columns ? run(by_tiles<P, 2, 2>) : run(by_tiles<P, 2, 1>);
            else j + 1 < columns ? run(by_tiles<P, 1, 2>) : run(by_tiles<P, 1, 1>);
        }
#else
    constexpr int most = W == 16 ? 4 : 1;  // tiles of columns that fit the registers
    for (int parts = (columns + most - 1) / most, j = 0; parts; parts--) {
        const int n = (columns - j + parts - 1) / parts;
        for (int row = 0; row < rows;) {
            const int rest = std::min(16 - row % 16, rows - row);
            const auto run = [&](auto six, auto four) {
                const char *from = a + row / 16 * next + row % 16 * 64;
                (rest > 4 ? six : four)(from, b + j * next, L, out + row * ldo + j * 16, ldo, ahead < end ? ahead : nullptr);
            };
            constexpr int V = 16 / W;
            switch (n) {
                case 1: run(by_vectors<P, 6, V>, by_vectors<P, 4, V>); break;
                case 2: run(by_vectors<P, 6, 2 * V>, by_vectors<P, 4, 2 * V>); break;
                case 3: run(by_vectors<P, 6, 3 * V>, by_vectors<P, 4, 3 * V>); break;
                default: run(by_vectors<P, 6, 4 * V>, by_vectors<P, 4, 4 * V>);
            }
            row += std::min(rest, 6);
            if (ahead) ahead += L * TILE;
        }
        j += n;
    }
#endif
}

// ---- what Python passes ---------------------------------------------------------------------------------------------

struct Linear {         // of a layer with `outputs` columns and k inputs
    const char *weight;  // B
    const float *bias;
    const float *scale, *shift;  // of integers: scale of each column; their sum times that
    int32_t outputs, k;
};

struct Block {
    Linear qkv, proj, fc1, fc2;  // SwiGLU: the columns of fc1 are 32 of the gate, 32 of the value, and so on
};

struct Job {
    const Block *blocks;
    float *x;            // [images, tokens, width], in place
    float *const *keep;  // of each block: where its output goes, or null
    const float *sin, *cos;  // [tokens - prefix, width / heads]
    // cls_only: of the last block's output nothing but the first token of each image is wanted; the others are undefined
    int32_t n_blocks, images, tokens, prefix, width, heads, swiglu, rms, threads, cls_only;
    float eps;
};

// ---- the blocks -----------------------------------------------------------------------------------------------------

constexpr int ROWS = 256;  // at most, of the residual stream, that go through all layers between two attentions together
constexpr int FEW_ROWS = 32;

// integers by vectors, where a layer's weights stay in a second cache of 1 MB (ViT-S): so should its hidden numbers, and FEW_ROWS go
// through the layers together; with one thread, few images through all blocks. Larger models wait for weights instead
template <class P> bool in_cache([[maybe_unused]] const Job &job) {
#ifdef __AMX_TILE__
    return false;  // 32 rows were not measured there
#else
    return quantised<P> && (int64_t)job.blocks->fc2.k * job.width <= 1 << 20;
#endif
}

struct Buffer {
    std::unique_ptr<char, decltype(&std::free)> memory;
    explicit Buffer(size_t bytes) : memory((char *)std::aligned_alloc(4096, (bytes + 8191) & ~(size_t)4095), std::free) {
        if (!memory) throw std::bad_alloc();
    }
    operator char *() const { return memory.get(); }
    operator float *() const { return (float *)memory.get(); }
};

inline vf widen(const float *p) { return load(p); }
inline void narrow(float *p, vf v) { store(p, v); }
#ifdef __AVX512BF16__
inline vf widen(const uint16_t *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
inline void narrow(uint16_t *p, vf v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, 32);
}
#endif

// W columns of tokens t (even) and t + 1 into B, tokens along k: a group for bf16, two for float32
template <class P> inline void put_pair(char *b, int L, int t, int column, vf even, vf odd) {
    char *to = b + (size_t)(column / 16 * L + t / line<P>) * P::planes * TILE + t % line<P> / P::group * 64 + column % 16 * 4;
    if constexpr (std::is_same_v<P, F32>) store((float *)to, even), store((float *)(to + 64), odd);
#ifdef __AVX512BF16__
    else
        for (int plane = 0; plane < P::planes; plane++) {
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd)), 16);
            _mm512_storeu_si512(to + plane * TILE, _mm512_or_si512(low, high));
            even -= (vf)_mm512_slli_epi32(low, 16), odd -= (vf)high;
        }
#endif
}

template <class P> size_t operand(size_t rows, size_t k) {  // bytes
    return (rows + 15) / 16 * ((k + line<P> - 1) / line<P>) * P::planes * TILE;
}

// a tile of 16 × 16 words
inline void transpose(char *tile) {
#ifdef __AVX512F__
    const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i word[16];
    std::memcpy(word, tile, TILE);
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2) {  // exchanges columns with bit `step` of line i and without it of line i + step
        const __mmask16 set = _mm512_test_epi32_mask(number, _mm512_set1_epi32(step));
        const __m512i other = _mm512_xor_si512(number, _mm512_set1_epi32(step));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & step)) {
                const __m512i first = word[i], second = word[i + step];
                word[i] = _mm512_mask_permutexvar_epi32(first, set, other, second);
                word[i + step] = _mm512_mask_permutexvar_epi32(second, (__mmask16)~set, other, first);
            }
    }
    std::memcpy(tile, word, TILE);
#else
    int32_t word[16][16];
    std::memcpy(word, tile, TILE);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) ((int32_t(*)[16])tile)[j][i] = word[i][j];
#endif
}

// P: numbers of the linear layers; A: of attention
template <class P, class A> struct Run {
    using Stored = std::conditional_t<A::group == 2 && A::planes == 1, uint16_t, float>;

    const Job &job;
    const int D, N, d, M, N32, hidden;
    Buffer qkv, attended;  // [images, heads, 3, N, d]; A of [M, D], or floats where it is quantised
    std::deque<std::atomic<int>> next;  // task of each stage

    explicit Run(const Job &j)
        : job(j), D(j.width), N(j.tokens), d(D / j.heads), M(j.images * N), N32((N + 31) / 32 * 32), hidden(j.blocks->fc2.k),
          qkv((size_t)M * 3 * D * sizeof(Stored)), attended(quantised<P> ? (size_t)M * D * 4 : operand<A>(M + 31, D)),
          next(2 * j.n_blocks + 1) {}

    struct Range {
        vf low{}, high{};
        void take(vf v) { low = smaller(v, low), high = larger(v, high); }
    };

    struct Scratch {  // of a thread
        Buffer a, h, wide, out, scores, q, k, v, p;
        float scale[ROWS], zero[ROWS];
        std::vector<Range> ranges;  // of the rows of `wide`
        int packed = -1;  // the image and head whose k and v are packed
        explicit Scratch(const Run &r)
            : a(operand<P>(ROWS, r.D)), h(operand<P>(ROWS, r.hidden)), wide(quantised<P> ? (size_t)ROWS * r.hidden * 4 : 0),
              out(32 * std::max(64, r.d) * 4), scores((size_t)32 * r.N32 * 4), q(operand<A>(32, r.d)),
              k(operand<A>(r.N32, r.d)), v(operand<A>(r.d, r.N32)), p(operand<A>(32, r.N32)), ranges(quantised<P> ? ROWS : 0) {}
    };

    Stored *head(int image, int head, int third) const {
        return (Stored *)(char *)qkv + (((size_t)image * job.heads + head) * 3 + third) * N * d;
    }

    // k values between low and high, value(c): W of them, as integers with a zero point: x ≈ scale · (u - zero). NaN and infinity
    // make the scale NaN, and so the whole row
    template <class F> static void quantise(float low, float high, int k, char *a, int row, Scratch &s, F value) {
        const float range = high - low, scale = range > 0 ? range / P::most : 1, zero = std::nearbyint(-low / scale);
        const vf inverse = all(1 / scale), shift = all(zero);
        vf finite{};
        for (int c = 0; c < k; c += 4 * W) {
            vf v[4];
            for (int i = 0; i < 4; i++) finite += v[i] = value(c + i * W) * inverse + shift;
            put_integers<P>(a, k / line<P>, row, c, v);
        }
        s.scale[row] = scale + 0 * sum(finite), s.zero[row] = zero;
    }

    void norm(const float *x, int row, Scratch &s) const {
        vf total{}, squares{};
        if (!job.rms)
            for (int c = 0; c < D; c += W) total += load(x + c);
        const float mean = sum(total) / D;
        Range range;
        for (int c = 0; c < D; c += W) {
            const vf v = load(x + c) - mean;
            squares += v * v;
            if constexpr (quantised<P>) range.take(v);
        }
        const float factor = 1 / std::sqrt(sum(squares) / D + job.eps);
        const auto value = [&](int c) { return (load(x + c) - mean) * factor; };
        if constexpr (quantised<P>) quantise(-largest(-range.low) * factor, largest(range.high) * factor, D, s.a, row, s, value);
        else
            for (int c = 0; c < D; c += 2 * W) put_two<P>(s.a, D / line<P>, row, c, value(c), value(c + W));
    }

    // calls use(row, column, value) for every row and `width` columns at a time; value(i): columns + i to + W
    template <class F> void linear(const char *a, const Linear &layer, int rows, int width, Scratch &s, F use) const {
        const int L = layer.k / line<P>;
        const size_t next_tile = (size_t)L * P::planes * TILE, panel = width / 16 * next_tile;
        float *out = s.out;
        for (int column = 0; column < layer.outputs; column += width) {
            const char *weight = layer.weight + column / 16 * next_tile, *next = weight + panel;
            const char *end = column + width < layer.outputs ? next + panel : next;
            for (int row = 0; row < rows; row += 32) {
                // 32 rows take six runs over k
                product<P>(a + row / 16 * next_tile, weight, L, std::min(32, rows - row), width / 16, out, width,
                           next + (size_t)row / 32 * 6 * L * TILE, end);
                for (int r = row; r < std::min(rows, row + 32); r++)
                    use(r, column, [&, from = out + (r - row) * width](int i) {
                        const vf bias = load(layer.bias + column + i);
                        if constexpr (!quantised<P>) return load(from + i) + bias;
                        vi sums;
                        std::memcpy(&sums, from + i, sizeof sums);
                        const vf scale = s.scale[r] * load(layer.scale + column + i);
                        return __builtin_convertvector(sums, vf) * scale +
                               (bias - s.scale[r] * s.zero[r] * load(layer.shift + column + i));
                    });
            }
        }
    }

    bool first_tokens(int b) const { return job.cls_only && b == job.n_blocks - 1; }

    // block b from attention's output to its end, for `rows` tokens; of its first tokens alone a row is an image
    void finish(int b, int row0, int rows, Scratch &s) const {
        const Block &block = job.blocks[b];
        const size_t step = (size_t)D * (first_tokens(b) ? N : 1);  // from row to row
        float *x = job.x + row0 * step;
        const auto add = [&](int row, int column, auto value) {
            float *to = x + row * step + column;
            for (int i = 0; i < 64; i += W) store(to + i, load(to + i) + value(i));
        };
        const char *a = (char *)attended + operand<A>(row0, D);
        if constexpr (quantised<P>) {
            for (int r = 0; r < rows; r++) {
                const float *from = (float *)attended + (size_t)(row0 + r) * D;
                Range range;
                for (int c = 0; c < D; c += W) range.take(load(from + c));
                quantise(-largest(-range.low), largest(range.high), D, s.a, r, s, [&](int c) { return load(from + c); });
            }
            a = s.a;
        }
        linear(a, block.proj, rows, 64, s, add);
        for (int r = 0; r < rows; r++) norm(x + r * step, r, s);
        if constexpr (quantised<P>) std::fill(s.ranges.begin(), s.ranges.begin() + rows, Range());
        const auto hide = [&](int row, int column, vf first, vf second) {
            if constexpr (quantised<P>) {
                float *to = (float *)s.wide + (size_t)row * hidden + column;
                store(to, first), store(to + W, second);
                s.ranges[row].take(first), s.ranges[row].take(second);
            } else
                put_two<P>(s.h, hidden / line<P>, row, column, first, second);
        };
        if (job.swiglu)
            linear(s.a, block.fc1, rows, 64, s, [&](int row, int column, auto value) {
                const auto gated = [&](int i) { return silu(value(i)) * value(i + 32); };
                for (int i = 0; i < 32; i += 2 * W) hide(row, column / 2 + i, gated(i), gated(i + W));
            });
        else
            linear(s.a, block.fc1, rows, 64, s, [&](int row, int column, auto value) {
                for (int i = 0; i < 64; i += 2 * W)
                    hide(row, column + i, gelu<rough<P>>(value(i)), gelu<rough<P>>(value(i + W)));
            });
        if constexpr (quantised<P>)
            for (int r = 0; r < rows; r++)
                quantise(-largest(-s.ranges[r].low), largest(s.ranges[r].high), hidden, s.h, r, s,
                         [&, from = (float *)s.wide + (size_t)r * hidden](int c) { return load(from + c); });
        linear(s.h, block.fc2, rows, 64, s, add);
        if (job.keep[b]) std::memcpy(job.keep[b] + (size_t)row0 * D, x, (size_t)rows * D * 4);
    }

    // q, k and v of block b; q and k of patches are turned
    void begin(int b, int row0, int rows, Scratch &s) const {
        for (int r = 0; r < rows; r++) norm(job.x + (size_t)(row0 + r) * D, r, s);
        linear(s.a, job.blocks[b].qkv, rows, d, s, [&](int row, int column, auto value) {
            const int image = (row0 + row) / N, token = (row0 + row) % N, patch = token - job.prefix, half = d / 2;
            Stored *to = head(image, column % D / d, column / D) + (size_t)token * d;
            if (column < 2 * D && patch >= 0 && job.sin) {
                const float *sin = job.sin + (size_t)patch * d, *cos = job.cos + (size_t)patch * d;
                for (int i = 0; i < half; i += W) {
                    const vf first = value(i), second = value(i + half);
                    narrow(to + i, first * load(cos + i) - second * load(sin + i));
                    narrow(to + i + half, second * load(cos + i + half) + first * load(sin + i + half));
                }
            } else
                for (int i = 0; i < d; i += W) narrow(to + i, value(i));
        });
    }

    // k and v of one head of one image as B of q · kᵀ and of p · v; tokens that fill the last tiles are zero
    void pack(const Stored *k, const Stored *v, Scratch &s) const {
        const int L = d / line<A>;
        const auto of = [&](const Stored *p, int t, int c) { return t < N ? widen(p + (size_t)t * d + c) : vf{}; };
        for (int t = 0; t < N32; t += 2)
            for (int c = 0; c < d; c += W) {
                put<A>(s.k, L, t, c, of(k, t, c)), put<A>(s.k, L, t + 1, c, of(k, t + 1, c));
                put_pair<A>(s.v, N32 / line<A>, t, c, of(v, t, c), of(v, t + 1, c));
            }
        for (char *tile = s.k, *end = tile + operand<A>(N32, d); tile < end; tile += TILE) transpose(tile);
    }

    // queries q0 to q1 of one head of one image, whose first row of the result is `row0`
    void attend(int image, int h, int q0, int q1, int row0, Scratch &s) const {
        const Stored *q = head(image, h, 0);
        if (s.packed != image * job.heads + h) pack(head(image, h, 1), head(image, h, 2), s), s.packed = image * job.heads + h;
        for (; q0 < q1; q0 += 32) {
            const int rows = std::min(32, q1 - q0);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < d; c += W) put<A>(s.q, d / line<A>, r, c, widen(q + (size_t)(q0 + r) * d + c));
            float *scores = s.scores, *out = s.out, weight[32];
            product<A>(s.q, s.k, d / line<A>, rows, (N + 15) / 16, scores, N32);
            for (int r = 0; r < rows; r++) {
                float *row = scores + (size_t)r * N32;
                std::fill(row + N, row + N32, -1e30f);
                vf most = load(row), total{};
                for (int c = W; c < N32; c += W) most = larger(load(row + c), most);
                const vf top = all(largest(most) * LOG2E);
                for (int c = 0; c < N32; c += 2 * W) {
                    const vf first = power<rough<A>>(load(row + c) * LOG2E - top);
                    const vf second = power<rough<A>>(load(row + c + W) * LOG2E - top);
                    total += first + second;
                    put_two<A>(s.p, N32 / line<A>, r, c, first, second);
                }
                weight[r] = 1 / sum(total);
            }
            product<A>(s.p, s.v, N32 / line<A>, rows, d / 16, out, d);
            for (int r = 0; r < rows; r++)
                for (int c = 0, row = row0 + q0 + r; c < d; c += W) {
                    const vf v = load(out + r * d + c) * weight[r];
                    if constexpr (quantised<P>) store((float *)attended + (size_t)row * D + h * d + c, v);
                    else put<A>(attended, D / line<A>, row, h * d + c, v);
                }
        }
    }

    // one of `threads` threads: takes tasks of a stage until none is left, and waits for the others
    void work(Scratch &s, int threads, std::barrier<> &all_done) {
        const auto each = [&](int stage, int tasks, auto run) {
            for (int task; (task = next[stage].fetch_add(1)) < tasks;) run(task);
            if (threads > 1) all_done.arrive_and_wait();
        };
        const size_t bytes = operand<P>(16, D + hidden) / 16 + (quantised<P> ? hidden * 4 : 0);  // of a row between the layers
        const long cache = std::clamp(sysconf(_SC_LEVEL2_CACHE_SIZE), 1L << 20, quantised<P> ? 1L << 20 : 2L << 20);
        const int most = in_cache<P>(job) ? FEW_ROWS : std::clamp((int)(cache / bytes), 64, ROWS);
        const auto rows_of = [&](int total) {  // that a task takes
            const int groups = ((total + most - 1) / most + threads - 1) / threads * threads;
            return ((total + groups - 1) / groups + 31) / 32 * 32;
        };
        const int chunk = threads == 1 ? N32 : 128, chunks = (N + chunk - 1) / chunk;
        for (int b = 0; b <= job.n_blocks; b++) {
            const int total = b > 0 && first_tokens(b - 1) ? job.images : M, rows = rows_of(total);
            each(2 * b, (total + rows - 1) / rows, [&](int task) {
                const int row0 = task * rows, n = std::min(rows, total - row0);
                if (b > 0) finish(b - 1, row0, n, s);
                if (b < job.n_blocks) begin(b, row0, n, s);
            });
            if (b == job.n_blocks) break;
            s.packed = -1;
            const bool first = first_tokens(b);
            each(2 * b + 1, job.images * job.heads * (first ? 1 : chunks), [&](int task) {
                const int head = first ? task : task / chunks, image = head / job.heads;
                const int q0 = first ? 0 : task % chunks * chunk, q1 = first ? 1 : std::min(N, q0 + chunk);
                attend(image, head % job.heads, q0, q1, first ? image : image * N, s);
            });
        }
    }
};

// AMX needs the kernel's permission once for a process, and shapes of tiles in every thread
bool tiles_allowed() {
#ifdef __AMX_TILE__
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#else
    return true;
#endif
}

struct Tiles {
    Tiles() {
#ifdef __AMX_TILE__
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
        asm volatile("" ::: "memory");  // as in by_tiles
        _tile_loadconfig(config);
#endif
    }
    ~Tiles() {
#ifdef __AMX_TILE__
        _tile_release();
#endif
    }
};

template <class P, class A> void together(const Job &job) {
    Run<P, A> run(job);
    std::deque<typename Run<P, A>::Scratch> scratch;
    for (int i = 0; i < job.threads; i++) scratch.emplace_back(run);
    std::vector<std::thread> threads;
    std::atomic<int> team{0};  // its size, once all threads are there
    std::unique_ptr<std::barrier<>> all_done;
    const auto work = [&](int i) {
        team.wait(0);
        [[maybe_unused]] const Tiles tiles;
        run.work(scratch[i], team, *all_done);
    };
    threads.reserve(job.threads);
    try {
        for (int i = 1; i < job.threads; i++) threads.emplace_back(work, i);
    } catch (const std::system_error &) {  // no more threads: those that are there do it
    }
    all_done = std::make_unique<std::barrier<>>(threads.size() + 1);
    team = (int)threads.size() + 1;
    team.notify_all();
    work(0);
    for (auto &thread : threads) thread.join();
}

template <class P, class A> void execute(Job job) {
    const int all = job.images, few = in_cache<P>(job) && job.threads == 1 ? std::max(1, ROWS / job.tokens) : all;
    std::vector<float *> keep(job.keep, job.keep + job.n_blocks);
    job.keep = keep.data();
    for (int done = 0; done < all; done += few) {
        job.images = std::min(few, all - done);
        together<P, A>(job);
        const size_t size = (size_t)job.images * job.tokens * job.width;
        job.x += size;
        for (float *&to : keep) to += to ? size : 0;
    }
}

}  // namespace

// whether this machine runs what this file was compiled for, beyond the CPU's features
extern "C" int dinov3_ready() { return tiles_allowed(); }

// 0, or 1: out of memory, 2: unknown precision
extern "C" int dinov3_blocks(const Job *job, int precision) {
    try {
        switch (precision) {
#ifdef __AMX_TILE__
            case 0: execute<Split, Split>(*job); return 0;
#else
            case 0: execute<F32, F32>(*job); return 0;
#endif
#ifdef __AVX512BF16__
            case 1: execute<Bf16, Bf16>(*job); return 0;
            case 2: execute<I8, Bf16>(*job); return 0;
#else
            case 1: execute<I16, F32>(*job); return 0;
            case 2: execute<I8, F32>(*job); return 0;
#endif
        }
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 2;
}
