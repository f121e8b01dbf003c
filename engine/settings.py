"""What an engine can be told on the command line."""

from dataclasses import dataclass

from config import ModelConfig, knob


@dataclass(frozen=True)
class EngineConfig(ModelConfig):
    """How many requests share how much. vLLM's names for the same: max_num_seqs, max_num_batched_tokens."""

    max_running: int = knob(32, "requests that hold memory at once (max_num_seqs)", least=1)
    max_tokens: int = knob(512, "tokens computed in one step, at most (max_num_batched_tokens)", least=1)
    kv_memory: float = knob(
        0.0, "GB for keys and values; 0 = what max_running contexts need, at most a quarter of what is free", least=0
    )
    whole_prompts: bool = knob(False, "compute each prompt in one step, never in pieces (no chunked prefill)")
    no_prefix_cache: bool = knob(False, "never share the keys and values of a common beginning")
    native: str = knob(
        "auto",
        "the C forward pass: if it is compiled, else compile it meanwhile for the next start; or wait for that; or off",
        choices=("auto", "wait", "off"),
    )
