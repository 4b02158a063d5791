"""Unmodified Hugging Face `generate()` over the paged cache.

python examples/hf_generate.py
"""

import torch

from kvpaged import PagedKVCache
from kvpaged.testing import models

model, tokenizer = models.load("smollm2", dtype=torch.bfloat16)  # or any AutoModelForCausalLM
cache = PagedKVCache.for_model(model, memory="256MiB", page_size=64)

chat = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
with cache.session(prompt.input_ids, attention_mask=prompt.attention_mask) as past:
    out = model.generate(**prompt, past_key_values=past, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))
    print(f"{past.pages()} pages, {past.memory_bytes():,} bytes of K and V")
cache.close()
