#include "layers.h"

template void apt::all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<BFloat16>>&,
                              const Pool<int8_t>&, BFloat16*);
