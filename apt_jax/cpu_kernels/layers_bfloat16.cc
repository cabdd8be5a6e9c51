#include "layers.h"

template void apt::all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<BFloat16>>&,
                              const Pool<BFloat16>&, BFloat16*);
