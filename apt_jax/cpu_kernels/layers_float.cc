#include "layers.h"

template void apt::all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<float>>&,
                              const Pool<float>&, float*);
