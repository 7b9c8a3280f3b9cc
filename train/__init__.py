"""Training any layout with Lightning. Import it before torch, which then lets waiting threads sleep."""

import os

# OpenMP's threads spin while they wait, unless told otherwise: on a machine that does other work too, they take the
# cores from the very threads they wait for. torch's OpenMP library reads the variable when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
