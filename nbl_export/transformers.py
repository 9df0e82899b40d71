"""``import nbl_export.transformers`` and transformers loads the folders of `convert --to hf`, without remote code.

import nbl_export.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("out/model/hf/fp16")
"""

from nbl_export.models.modeling_nbl import register

register()
