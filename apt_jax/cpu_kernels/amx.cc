#include "amx.h"

#if defined(APT_AMX)
template void apt::multiply_packed_blocks(const BFloat16*, const Tiles&, int, int, const BFloat16*, const Scales&, int,
                                          int, int, float*, int);
template void apt::multiply_packed_blocks(const BFloat16*, const Tiles&, int, int, const int8_t*, const Scales&, int,
                                          int, int, float*, int);
template void apt::multiply_packed_blocks(const int8_t*, const Tiles&, int, int, const int8_t*, const Scales&, int, int,
                                          int, float*, int);
#endif
