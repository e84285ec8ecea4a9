// The instructions of AVX-512 (with VNNI, bf16) and AVX-VNNI that blocks.cpp uses, as plain loops: its levels are compiled with
// -DEMULATE_… and tested on CPUs that lack them.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class T, int bytes = 64> struct Lanes {
    T v[bytes / sizeof(T)];
    template <class M> static Lanes of(const M &m) { Lanes r; std::memcpy(&r, &m, bytes); return r; }
    template <class M> operator M() const { M m; std::memcpy(&m, this, bytes); return m; }
};

template <class T, int bytes = 64, class F> Lanes<T, bytes> each(F of) {
    Lanes<T, bytes> r;
    for (int i = 0; i < (int)(bytes / sizeof(T)); i++) r.v[i] = of(i);
    return r;
}

// c + the sum of n products of A and B in each 32 bits
template <class A, class B, int bytes, class M> M dot(M c, M a, M b) {
    const auto x = Lanes<A, bytes>::of(a);
    const auto y = Lanes<B, bytes>::of(b);
    auto sums = Lanes<int32_t, bytes>::of(c);
    for (int i = 0; i < (int)(bytes / sizeof(A)); i++) sums.v[i * sizeof(A) / 4] += (int32_t)x.v[i] * y.v[i];
    return sums;
}

#ifdef EMULATE_AVX512
using Floats = Lanes<float>;
using Ints = Lanes<int32_t>;

template <class From, class To> __m512i packus(__m512i a, __m512i b) {  // of each 16 bytes of a, then of b
    constexpr int n = 16 / sizeof(From);
    const auto x = Lanes<From>::of(a), y = Lanes<From>::of(b);
    return each<To>([&](int i) {
        const int lane = i / (2 * n), place = i % (2 * n);
        return std::clamp<int>((place < n ? x : y).v[lane * n + place % n], 0, (1 << 8 * sizeof(To)) - 1);
    });
}
template <class T> __m512i permuted(__m512i order, __m512i a) {
    const auto x = Lanes<T>::of(a), from = Lanes<T>::of(order);
    return each<T>([&](int i) { return x.v[from.v[i] % (64 / sizeof(T))]; });
}
inline uint16_t bf16(float x) {  // to the nearest, even of two
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? (bits >> 16) | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline __m512 max_ps(__m512 a, __m512 b) { return each<float>([x = Floats::of(a), y = Floats::of(b)](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline __m512 min_ps(__m512 a, __m512 b) { return each<float>([x = Floats::of(a), y = Floats::of(b)](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
inline float reduce_add_ps(__m512 a) { float sum = 0; for (float x : Floats::of(a).v) sum += x; return sum; }
inline float reduce_max_ps(__m512 a) { float most = Floats::of(a).v[0]; for (float x : Floats::of(a).v) most = x > most ? x : most; return most; }
inline __m512 rcp14_ps(__m512 a) { return each<float>([x = Floats::of(a)](int i) { return 1.00004f / x.v[i]; }); }
inline __m512 reduce_ps(__m512 a, int) { return each<float>([x = Floats::of(a)](int i) { return x.v[i] - std::nearbyint(x.v[i]); }); }
inline __m512 scalef_ps(__m512 a, __m512 b) {
    return each<float>([x = Floats::of(a), y = Floats::of(b)](int i) { return x.v[i] * std::exp2(std::floor(y.v[i])); });
}
inline __m512i cvtps_epi32(__m512 a) { return each<int32_t>([x = Floats::of(a)](int i) { return _mm_cvtss_si32(_mm_set_ss(x.v[i])); }); }
inline __m512i min_epu16(__m512i a, __m512i b) {
    return each<uint16_t>([x = Lanes<uint16_t>::of(a), y = Lanes<uint16_t>::of(b)](int i) { return std::min(x.v[i], y.v[i]); });
}
inline __m512i set1_epi16(short x) { return each<int16_t>([=](int) { return x; }); }
inline __m512i set1_epi32(int x) { return each<int32_t>([=](int) { return x; }); }
template <class... T> __m512i setr_epi32(T... x) { return Ints{{x...}}; }
template <class... T> __m512i setr_epi64(T... x) { return Lanes<int64_t>{{x...}}; }
inline __m512i xor_si512(__m512i a, __m512i b) { return each<int32_t>([x = Ints::of(a), y = Ints::of(b)](int i) { return x.v[i] ^ y.v[i]; }); }
inline __m512i or_si512(__m512i a, __m512i b) { return each<int32_t>([x = Ints::of(a), y = Ints::of(b)](int i) { return x.v[i] | y.v[i]; }); }
inline __m512i slli_epi32(__m512i a, int n) { return each<int32_t>([n, x = Ints::of(a)](int i) { return (uint32_t)x.v[i] << n; }); }
inline __m512i cvtepu16_epi32(__m256i a) { return each<int32_t>([x = Lanes<uint16_t, 32>::of(a)](int i) { return x.v[i]; }); }
inline __mmask16 test_epi32_mask(__m512i a, __m512i b) {
    int mask = 0;
    for (int i = 0; i < 16; i++) mask |= ((Ints::of(a).v[i] & Ints::of(b).v[i]) != 0) << i;
    return mask;
}
inline __m512i mask_permutexvar_epi32(__m512i other, __mmask16 mask, __m512i order, __m512i a) {
    return each<int32_t>([=, x = Ints::of(permuted<int32_t>(order, a)), y = Ints::of(other)](int i) { return mask >> i & 1 ? x.v[i] : y.v[i]; });
}
inline __m256bh cvtneps_pbh(__m512 a) { return each<uint16_t, 32>([x = Floats::of(a)](int i) { return bf16(x.v[i]); }); }
inline __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
    return each<uint16_t>([x = Floats::of(a), y = Floats::of(b)](int i) { return bf16(i < 16 ? y.v[i] : x.v[i - 16]); });
}
inline __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    const auto x = Lanes<uint16_t>::of(a), y = Lanes<uint16_t>::of(b);
    auto sums = Floats::of(c);
    for (int i = 0; i < 32; i++) sums.v[i / 2] += widened(x.v[i]) * widened(y.v[i]);
    return sums;
}
#endif

}  // namespace emulated

#ifdef EMULATE_AVXVNNI
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated::dot<uint8_t, int8_t, 32>
#define _mm256_dpwssd_avx_epi32 emulated::dot<int16_t, int16_t, 32>
#endif

#ifdef EMULATE_AVX512
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_rcp14_ps emulated::rcp14_ps
#define _mm512_reduce_ps emulated::reduce_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_packus_epi32 emulated::packus<int32_t, uint16_t>
#define _mm512_packus_epi16 emulated::packus<int16_t, uint8_t>
#define _mm512_permutexvar_epi32 emulated::permuted<int32_t>
#define _mm512_permutexvar_epi64 emulated::permuted<int64_t>
#define _mm512_mask_permutexvar_epi32 emulated::mask_permutexvar_epi32
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm512_min_epu16 emulated::min_epu16
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_setr_epi64 emulated::setr_epi64
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_storeu_si512(to, x) std::memcpy(to, &static_cast<const __m512i &>(x), 64)
#define _mm512_dpbusd_epi32 emulated::dot<uint8_t, int8_t, 64>
#define _mm512_dpwssd_epi32 emulated::dot<int16_t, int16_t, 64>
#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#endif
#endif
