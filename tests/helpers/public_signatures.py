"""Signatures of the public interface."""

from __future__ import annotations

# Parameters by import path. "_" is a parameter that callers pass only by position, so that its name may change.
# A callable may have further parameters if they are optional and follow the listed ones.
SIGNATURES = {
    "open_lm.main.main": "_",
    "open_lm.main.load_model": "args, model, different_seed=False",
    "open_lm.params.parse_args": "_",
    "open_lm.params.add_model_args": "parser",
    "open_lm.model.create_model": "_",
    "open_lm.model.create_params": "_",
    "open_lm.model.Block": "layer_id, _",
    "open_lm.model.Transformer": "_",
    "open_lm.model.Transformer.forward": (
        "self, input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=False, attention_mask=None"
    ),
    "open_lm.model.Transformer.set_grad_checkpointing": "self, enable=True",
    "open_lm.model.Transformer.reset_parameters": "self",
    "open_lm.attention.get_attn_func": "attn_name, attn_activation=None, attn_seq_scalar=None, alpha=None",
    "open_lm.attention.torch_attn": "_, _, _, is_causal, attention_mask=None",
    "open_lm.attention.xformers_attn": "_, _, _, is_causal, attention_mask=None",
    "open_lm.attention.custom_attn": (
        "_, _, _, attn_activation, attn_seq_scalar, alpha, is_causal=False, attention_mask=None"
    ),
    "open_lm.data.get_data": "args, epoch=0, tokenizer=None, skip_train=False, floor=True",
    "open_lm.data.get_wds_dataset": (
        "args, is_train, epoch=0, floor=True, tokenizer=None, data_key=None, force_num_samples=None"
    ),
    "open_lm.data.sample_chunk": "chunk, args",
    "open_lm.data.mask_sequence": "chunk, _, args, ignore_tok=-100",
    "open_lm.evaluate.evaluate_loop": "model, val_list, epoch, args, writer",
    "open_lm.distributed.world_info_from_env": "",
    "open_lm.distributed.init_distributed_device": "args",
    "open_lm.distributed.is_master": "args, local=False",
    "open_lm.distributed.broadcast_object": "args, obj, src=0",
    "open_lm.file_utils.pt_load": "file_path, map_location=None",
    "open_lm.file_utils.check_exists": "file_path",
    "open_lm.file_utils.get_metadata_file": "path, shard_shuffle_seed=None",
    "open_lm.file_utils.get_string_for_epoch": (
        "num_samples, starting_points, paths, weights, num_workers_per_gpu, world_size, multi_epoch=False, "
        "shard_shuffle_seed=None"
    ),
    "open_lm.scheduler.cosine_lr": "optimizer, base_lr, warmup_length, steps, min_lr, force_min_lr",
    "open_lm.scheduler.const_lr": "optimizer, base_lr, warmup_length",
    "open_lm.losses.CrossEntropyLossWithZLoss": "eps=0.0001",
    "open_lm.datapreprocess.ray.tokenize_shuffle.main": "_",
    "open_lm.utils.transformers.hf_config.OpenLMConfig": "params=None",
    "open_lm.utils.transformers.hf_model.OpenLMModel": "config",
    "open_lm.utils.transformers.hf_model.OpenLMforCausalLM": "config",
    "open_lm.hf.OpenLMConfig": "params=None",
    "open_lm.hf.OpenLMForCausalLM": "config",
    "open_lm.hf.OpenLMTokenizerFast": "",
}
