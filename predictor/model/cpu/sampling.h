// Choosing tokens from logits: greedy, or by inverting the cumulative distribution at one uniform number.
//
// The rules are those of predictor/engine/sampler.py `draw`, which is the reference: sums in fp64, top-k and top-p
// over candidates in descending order (the lower id first among equals), no truncation in vocabulary order.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"
#include "simd.h"

namespace {

// e^x in fp64 for x <= 0, to 2 units in the last place; 0 below -708.
inline Doubles exp(Doubles x) {
    const Doubles magic = Doubles{} + 6755399441055744.0;  // 1.5 * 2^52
    const Doubles floor = Doubles{} - 708.0;
    const Doubles bounded = x > floor ? x : floor;
    const Doubles shifted = bounded * 1.4426950408889634 + magic;
    const Doubles n = shifted - magic;
    Doubles r = bounded - n * 0.693147180369123816490;
    r = r - n * 1.90821492927058770002e-10;
    Doubles p = Doubles{} + 1.0 / 6227020800.0;
    const double inverse_factorials[] = {
        1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
        1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5,           1.0, 1.0};
    for (double coefficient : inverse_factorials) p = p * r + coefficient;
    const Longs exponent = ((Longs)shifted - (Longs)magic + 1023) << 52;
    return x < floor ? Doubles{} : p * (Doubles)exponent;
}

// The number in [0, 1) that a seed draws its token number `position` with: Philox4x32-10 (Salmon et al. 2011), as
// predictor/engine/philox.py, which a test holds equal.
inline double uniform(uint64_t seed, uint64_t position) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t first = (uint64_t)counter[0] * 0xD2511F53u, second = (uint64_t)counter[2] * 0xCD9E8D57u;
        const uint32_t next[4] = {(uint32_t)(second >> 32) ^ counter[1] ^ key[0], (uint32_t)second,
                                  (uint32_t)(first >> 32) ^ counter[3] ^ key[1], (uint32_t)first};
        memcpy(counter, next, sizeof counter);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return ((uint64_t)(counter[0] >> 5) * (1 << 26) + (counter[1] >> 6)) / 9007199254740992.0;  // 53 bits
}

constexpr int HALF = LANES / 2;

inline Doubles widen(const float* x) {
    typedef float Part __attribute__((vector_size(HALF * 4)));
    Part part;
    memcpy(&part, x, sizeof part);
    return __builtin_convertvector(part, Doubles);
}

struct Candidate {
    float logit;
    int32_t token;
};

inline bool better(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

inline bool any_above(Floats v, Floats threshold) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(v, threshold, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ)) != 0;
#else
    bool any = false;
    for (int i = 0; i < LANES; i++) any |= v[i] > threshold[i];
    return any;
#endif
}

// The `count` largest logits, best first.
inline void select(const float* logits, int vocabulary, int count, std::vector<Candidate>& best) {
    best.clear();
    const size_t limit = std::max(4 * (size_t)count, (size_t)256);
    float threshold = -INFINITY;
    const auto cut = [&] {
        if (best.size() <= (size_t)count) return;
        std::nth_element(best.begin(), best.begin() + count - 1, best.end(), better);
        best.resize(count);
        threshold = best.back().logit;
    };
    for (int token = 0; token < vocabulary; token += LANES) {
        const int lanes = std::min(LANES, vocabulary - token);
        if (lanes == LANES && !any_above(load(logits + token), splat(threshold))) continue;
        for (int i = 0; i < lanes; i++)
            if (logits[token + i] > threshold) best.push_back({logits[token + i], token + i});
        if (best.size() >= limit) cut();
    }
    cut();
    std::sort(best.begin(), best.end(), better);
}

struct Distribution {
    double largest, temperature;

    // In proportion to the probability; 1 for the largest logit at any temperature.
    Doubles weight(const float* logits) const { return exp((widen(logits) - largest) / temperature); }

    double weight(float logit) const {
        float lanes[HALF] = {logit};
        return weight(lanes)[0];
    }
};

// Where a number u in [0, 1) falls among candidates in order, of which top_p of `total` is kept.
inline int32_t draw_sorted(
    const std::vector<Candidate>& best, const Distribution& distribution, double total, const Draw& draw, bool& enough) {
    const double u = uniform(draw.seed, draw.position);
    double mass = 0;
    std::vector<double> masses;
    for (const Candidate& candidate : best) {
        if (!masses.empty() && mass >= draw.top_p * total) break;
        mass += distribution.weight(candidate.logit);
        masses.push_back(mass);
    }
    enough = masses.size() < best.size() || mass >= draw.top_p * total;
    size_t index = 0;
    while (index + 1 < masses.size() && masses[index] <= u * mass) index++;
    return best[index].token;
}

constexpr int PART = 256;  // logits summed together

inline double part_mass(const float* logits, int count, const Distribution& distribution) {
    Doubles sums = {};
    int i = 0;
    for (; i + HALF <= count; i += HALF) sums += distribution.weight(logits + i);
    double mass = 0;
    for (int lane = 0; lane < HALF; lane++) mass += sums[lane];
    for (; i < count; i++) mass += distribution.weight(logits[i]);
    return mass;
}

// Every token is a candidate, in the order of the vocabulary.
inline int32_t draw_any(
    const float* logits, int vocabulary, const Distribution& distribution, const std::vector<double>& masses, double u) {
    const double target = u * masses.back();
    const int part = std::upper_bound(masses.begin(), masses.end(), target) - masses.begin();
    const int first = std::min(part, (int)masses.size() - 1) * PART, end = std::min(first + PART, vocabulary);
    double mass = first > 0 ? masses[first / PART - 1] : 0;
    int32_t last = first;  // rounding may leave the target past the part's end: its last possible token then
    for (int token = first; token < end; token++) {
        const double weight = distribution.weight(logits[token]);
        mass += weight;
        if (mass > target) return token;
        if (weight > 0) last = token;
    }
    return last;
}

inline int32_t choose(const float* logits, int vocabulary, const Draw& draw) {
    Floats best = splat(-INFINITY), nan = {};
    int token = 0;
    for (; token + LANES <= vocabulary; token += LANES) {
        const Floats x = load(logits + token);
        best = max(x, best);
        nan += x != x ? splat(1) : Floats{};
    }
    float most = largest(best);
    bool damaged = sum(nan) > 0;
    for (; token < vocabulary; token++) {
        most = logits[token] > most ? logits[token] : most;
        damaged |= logits[token] != logits[token];
    }
    if (damaged || !(fabsf(most) <= 3.4028235e38f)) return -1;
    if (draw.greedy) {
        token = 0;
        while (token + LANES <= vocabulary && !any_above(load(logits + token), splat(nextafterf(most, -INFINITY))))
            token += LANES;
        while (logits[token] != most) token++;
        return token;
    }
    const Distribution distribution{most, draw.temperature};
    std::vector<Candidate> candidates;
    bool enough;
    if (draw.top_k > 0 && draw.top_k < vocabulary) {
        select(logits, vocabulary, draw.top_k, candidates);
        double total = 0;
        for (const Candidate& candidate : candidates) total += distribution.weight(candidate.logit);
        return draw_sorted(candidates, distribution, total, draw, enough);
    }
    std::vector<double> masses;
    double total = 0;
    for (int first = 0; first < vocabulary; first += PART) {
        total += part_mass(logits + first, std::min(PART, vocabulary - first), distribution);
        masses.push_back(total);
    }
    if (draw.top_p >= 1) 
        return draw_any(logits, vocabulary, distribution, masses, uniform(draw.seed, draw.position));
    // As many of the best as it takes to hold top_p of the mass.
    for (int64_t count = 64;; count *= 8) {
        const int taken = (int)std::min(count, (int64_t)vocabulary);
        select(logits, vocabulary, taken, candidates);
        const int32_t chosen = draw_sorted(candidates, distribution, total, draw, enough);
        if (enough || taken == vocabulary) return chosen;
    }
}

}  // namespace
