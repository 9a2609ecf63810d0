"""What settings are called elsewhere: names of transformers, nanoGPT and Megatron, and where the same is set here.

Only errors read this: a foreign name is refused like any other unknown key, and answered with the key that was meant.
"""

from __future__ import annotations

from collections.abc import Sequence

_MODEL = {
    "model.vocab_size": ("padded_vocab_size",),
    "data.vocab_size": (),
    "model.model_dim": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_dim"),
    "model.num_layers": ("num_hidden_layers", "n_layer", "n_layers", "depth"),
    "model.num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "model.num_kv_heads": ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_query_groups"),
    "model.head_dim": ("kv_channels", "head_size"),
    "model.qk_norm": ("qk_layernorm", "use_qk_norm"),
    "model.attention_bias": ("add_qkv_bias", "qkv_bias"),
    "model.moe.expert_dim": ("moe_intermediate_size", "moe_ffn_hidden_size", "expert_hidden_size"),
    "model.moe.num_experts": ("n_routed_experts", "num_local_experts", "n_experts", "num_moe_experts"),
    "model.moe.top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_router_topk", "moe_top_k", "moe_topk"),
    "model.moe.num_shared_experts": ("n_shared_experts",),
    "model.moe.shared_dim": ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    "model.moe.renormalize": ("norm_topk_prob",),
    "model.moe.scale": ("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    "model.moe.score": ("scoring_func", "moe_router_score_function"),
    "model.moe.num_groups": ("n_group", "moe_router_num_groups"),
    "model.moe.groups_per_token": ("topk_group", "moe_router_group_topk"),
    "model.moe.balance_coef": ("router_aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coeff", "aux_loss_coef"),
    "model.moe.balance": ("moe_router_load_balancing_type", "load_balancing"),
    "model.moe.bias_update_rate": ("moe_router_bias_update_rate", "bias_update_speed"),
    "model.moe.z_loss_coef": ("moe_z_loss_coeff", "router_z_loss_coef", "z_loss"),
    "model.dense_layers": ("mlp_only_layers", "first_k_dense_replace", "moe_layer_freq"),
    "model.rope_theta": ("rotary_base", "rope_base"),
    "model.norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layernorm_epsilon"),
    "model.tie_embeddings": ("tie_word_embeddings", "tie_weights", "untie_embeddings_and_output_weights"),
    "model.init_std": ("initializer_range", "init_method_std"),
    "model.attention": ("attn_implementation", "attention_type", "layer_types"),
    "model.attention.block_size": ("moba_chunk_size", "chunk_size"),
    "model.attention.top_k": ("moba_topk", "moba_top_k"),
    "model.attention.window": ("sliding_window", "window_size"),
}

_TRAINING = {
    "steps": ("max_steps", "max_iters", "train_iters", "num_steps", "num_iterations", "total_steps", "train_steps"),
    "seq_len": (
        "max_position_embeddings",
        "seq_length",
        "sequence_length",
        "max_seq_len",
        "max_seq_length",
        "context_length",
        "context_size",
        "ctx_len",
        "n_ctx",
        "n_positions",
        "max_length",
    ),
    "samples_per_step": ("batch_size", "global_batch_size", "train_batch_size", "total_batch_size"),
    "samples_per_micro_batch": (
        "micro_batch_size",
        "per_device_train_batch_size",
        "per_device_batch_size",
        "device_batch_size",
    ),
    "optim": ("optimizer", "optim_type"),
    "optim.lr": ("learning_rate", "max_lr", "peak_lr"),
    "optim.adamw_lr": ("embedding_lr", "adam_lr"),
    "optim.weight_decay": ("wd",),
    "optim.clip_norm": ("max_grad_norm", "grad_clip", "clip_grad", "gradient_clipping", "gradient_clip_val"),
    "optim.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optim.eps": ("adam_epsilon", "adam_eps"),
    "optim.momentum": ("muon_momentum",),
    "optim.ema_decay": ("ema",),
    "optim.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_decay_style", "decay_lr"),
    "optim.schedule.warmup_steps": ("warmup_iters", "lr_warmup_iters", "num_warmup_steps", "warmup"),
    "optim.schedule.warmup_fraction": ("warmup_ratio", "lr_warmup_fraction"),
    "optim.schedule.decay_steps": ("lr_decay_iters", "lr_wsd_decay_iters", "cooldown_iters"),
    "optim.schedule.decay_fraction": ("warmdown_ratio", "cooldown_frac"),
    "optim.schedule.final_fraction": ("min_lr", "min_lr_ratio", "final_lr_frac"),
    "precision": ("dtype", "torch_dtype", "bf16", "fp16", "mixed_precision"),
    "recompute": (
        "gradient_checkpointing",
        "activation_checkpointing",
        "activation_checkpoint",
        "recompute_granularity",
    ),
    "offload_activations": ("cpu_offload_activations", "cpu_offloading", "activation_offloading"),
    "optim.offload_state": ("cpu_offload", "optimizer_cpu_offload", "optim_cpu_offload"),
    "optim.adam_state_dtype": ("exp_avg_dtype", "exp_avg_sq_dtype"),
    "seed": ("random_seed", "manual_seed"),
    "log_every": ("logging_steps", "log_interval", "log_freq"),
    "validate_every": ("eval_steps", "eval_interval", "eval_every", "val_check_interval"),
    "validation_samples": ("eval_iters", "max_eval_samples", "eval_tokens"),
    "checkpoint_every": ("save_steps", "save_interval", "save_every", "checkpoint_interval"),
    "keep_checkpoints": ("save_total_limit",),
    "logging": ("report_to", "wandb_log", "log_with"),
    "logging.wandb": ("use_wandb",),
    "logging.project": ("wandb_project",),
    "logging.tensorboard": ("tensorboard_dir",),
    "name": ("run_name", "experiment_name", "wandb_run_name"),
    "data.source": ("dataset", "data_path", "dataset_name", "train_data"),
    "data.tokenizer": ("tokenizer_model", "tokenizer_path", "tokenizer_name"),
    "data.validation_fraction": ("val_fraction", "val_size"),
    "device": ("accelerator",),
}

_SEVERAL = {
    "topk": ("model.attention.top_k", "model.moe.top_k"),
    "block_size": ("seq_len", "model.attention.block_size"),
    "intermediate_size": ("model.moe.expert_dim", "model.dense_dim"),
    "ffn_hidden_size": ("model.moe.expert_dim", "model.dense_dim"),
    "gradient_accumulation_steps": ("samples_per_step", "samples_per_micro_batch"),
    "grad_accum_steps": ("samples_per_step", "samples_per_micro_batch"),
}
"""Names that may mean one of two things."""

_KEYS = {**_MODEL, **_TRAINING}
_TAILS = [key.rpartition(".")[2] for key in _KEYS]

SYNONYMS: dict[str, tuple[str, ...]] = {
    # names of our own that were given in the wrong place
    **{tail: tuple(key for key in _KEYS if key.rpartition(".")[2] == tail) for tail in _TAILS},
    **{name: (key,) for key, names in _KEYS.items() for name in names},
    **_SEVERAL,
}
"""Name elsewhere -> paths from the root of a run's settings."""

_ROOTS = {path.partition(".")[0] for paths in SYNONYMS.values() for path in paths}


def meant_elsewhere(path: str, key: str, known: Sequence[str]) -> list[str]:
    """Paths of the settings that `key` is another program's name for; [] for names that none uses.

    path, known   where the key was given ("" at the root), and what can stand there

    A key that stands where it belongs, but in another class (MoBA's block_size for full attention), is nobody's name.
    """
    targets = SYNONYMS.get(key.lower().replace("-", "_"), ())
    # `pithwood prepare` has the settings of `data` alone: what lies outside of them is not answered there.
    roots = _ROOTS if path else known
    if f"{_plain(path)}.{key}" in targets or not {(path or target).partition(".")[0] for target in targets} <= {*roots}:
        return []
    found = []
    for target in targets:
        parent, _, name = target.rpartition(".")
        if parent != _plain(path):
            found.append(target)
        elif name in known:
            found.append(f"{path}.{name}" if path else name)
    return found


def _plain(path: str) -> str:
    """A path without the numbers and stars of lists: `model.attention.0` is `model.attention`."""
    return ".".join(part for part in path.split(".") if part != "*" and not part.isdecimal())
