"""The former name of train/estimate.py, which it runs. It will go with the next release."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    print("train/plan.py is called train/estimate.py now; this name will go", file=sys.stderr)
    script = Path(__file__).with_name("estimate.py")
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
