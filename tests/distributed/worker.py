"""One process of a test's launch: trains the stages of the given configurations, one after another.

torchrun --nproc_per_node 2 -m tests.distributed.worker a.yaml b.yaml
"""

import gc
import sys

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from avg_llava.common.workers import end_with_parent
from avg_llava.training.config import load_config
from avg_llava.training.processes import leave, set_up_logging
from avg_llava.training.run import run_stage

if __name__ == "__main__":
    set_up_logging()
    end_with_parent()
    for path in sys.argv[1:]:
        run_stage(load_config(path))
        # A real run ends here; what transformers and DeepSpeed keep of it must not reach the next one.
        unset_hf_deepspeed_config()
        gc.collect()
    leave(0)
