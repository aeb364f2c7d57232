// Attention, portable: vectors are arrays, which a compiler may or may not keep in registers.
#include "attention_math.h"

namespace {

struct Portable {
    static constexpr int WIDTH = 16, VECTORS = 1, COLUMNS = 16, ROWS = 4;

    struct Vector {
        float lanes[16];
    };

    static Vector zero() { return {}; }

    static Vector load(const float* from) {
        Vector v;
        std::memcpy(v.lanes, from, sizeof(v.lanes));
        return v;
    }

    static void store(float* to, const Vector& v) { std::memcpy(to, v.lanes, sizeof(v.lanes)); }

    static Vector broadcast(const float* from) {
        Vector v;
        for (float& lane : v.lanes) lane = *from;
        return v;
    }

    static Vector fma(const Vector& a, const Vector& b, const Vector& c) {
        Vector v;
        for (int lane = 0; lane < 16; ++lane) v.lanes[lane] = a.lanes[lane] * b.lanes[lane] + c.lanes[lane];
        return v;
    }
};

}  // namespace

const AttentionKernels scalar::attention = AttentionExport<WideMath<Portable>>::kernels;
