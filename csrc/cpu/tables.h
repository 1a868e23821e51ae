// Tables for AVX-512, whose permutes look up 16 floats in a register or 32 in two: exponentials with a
// quadratic instead of a quintic polynomial, logarithms with a quartic instead of an 11th-degree one.
#pragma once
#include <stdint.h>

#include "isa.h"

namespace KD_NS {

// Bits of 2^((63 - i) / 32), plus i << 18, plus 0xc0000000: less (k << 18), for the k of Exp, that is 2^n.
alignas(64) static const uint32_t kExpTable[32] = {
    0x007a83b3, 0x0079257d, 0x0077e4ba, 0x0076c0c7, 0x0075b907, 0x0074ccdf, 0x0073fbb8, 0x007344fd,
    0x0072a81e, 0x0072248c, 0x0071b9be, 0x0071672a, 0x00712c4d, 0x007108a4, 0x0070fbaf, 0x007104f3,
    0x007123f6, 0x0071583f, 0x0071a15b, 0x0071fed7, 0x00727043, 0x0072f532, 0x00738d3a, 0x007437f0,
    0x0074f4f0, 0x0075c3d3, 0x0076a43a, 0x007795c2, 0x0078980f, 0x0079aac3, 0x007acd87, 0x007c0000,
};

// 1 / (1 + (i + 1/2) / 16), rounded, and the negative logarithm of the rounded value.
alignas(64) static const float kInverseTable[16] = {
    0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f,
    0.711111128f, 0.680851042f, 0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
    0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f,
};
alignas(64) static const float kLogTable[16] = {
    0.030771628f, 0.0896121562f, 0.145181984f, 0.19782573f,  0.247836202f, 0.295464218f,
    0.340926558f, 0.384411722f,  0.426084429f, 0.466089696f, 0.504556f,    0.541597307f,
    0.577315331f, 0.611801565f,  0.645138025f, 0.677398741f,
};

}  // namespace KD_NS
