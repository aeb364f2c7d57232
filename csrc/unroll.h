// Loops unrolled by the language: an array of vectors indexed by constants stays in registers, where
// GCC leaves one indexed by a loop's counter in memory.
#pragma once

#include <utility>

namespace {

template <class Body, int... Index>
inline void unroll_sequence(std::integer_sequence<int, Index...>, const Body& body) {
    (body(std::integral_constant<int, Index>()), ...);
}

// body(0), body(1), ... body(COUNT - 1), with constants.
template <int COUNT, class Body>
inline void unroll(const Body& body) {
    unroll_sequence(std::make_integer_sequence<int, COUNT>(), body);
}

}  // namespace
