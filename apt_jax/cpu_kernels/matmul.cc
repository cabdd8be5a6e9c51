#include "matmul.h"

template void apt::multiply_packed(const float*, const Tiles&, int, int, const float*, const Scales&, int, int, int,
                                   float*, int, const char*);
template void apt::multiply_packed(const float*, const Tiles&, int, int, const BFloat16*, const Scales&, int, int, int,
                                   float*, int, const char*);
template void apt::multiply_packed(const BFloat16*, const Tiles&, int, int, const BFloat16*, const Scales&, int, int, int,
                                   float*, int, const char*);
