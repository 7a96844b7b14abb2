"""How PEFT's tests are counted: tables from regular expressions for their names to what they say of lowbit_lora."""

import re

#: Passes that the shim itself, or PEFT's own code, provides: they do not count.
PROVIDER = {
    r"test_from_pretrained_config_construction": "peft_config, which is the shim's",
    r"test_no_infinite_recursion": "a class of the shim",
}
#: Passes that check nothing here.
VACUOUS = {
    r"irregular_state": "a model of one layer: the test returns early",
    r"test_no_warning_by_default|test_variant_is_applied": "looks for what lowbit never has",
    r"test_wrong_scaling_datatype": "PEFT's own function refuses",
    r"TestTunerStateDictKeyPrefixes": "PEFT's own names of keys",
}
#: Failures looked into: lowbit_lora does it otherwise, and may.
EXPLAINED = {
    r"test_merge_layers_is_idempotent|test_sequential_merge|test_unmerge_after_sequential": "refuses to merge while "
    "adapters are merged, where PEFT adds to them, or warns",
    r"fsdp_wrapped_learnable_bias": "refuses trained biases where the config trains none",
    r"test_adapter_dtype_autocast.*(DoRA|Dora)": "keeps DoRA's magnitudes in fp32 beside factors in 16 bits",
    r"irregular_state": "restores each layer as it was, where PEFT warns and switches all of them on",
    r"(pissa|olora)_conversion": "saves what fits the base as it was, without being asked for it",
    r"(pissa|olora)_(rank|alpha)_pattern_and_rslora_raises": "converts these too, which PEFT refuses",
    r"load_pissa_olora_with_other_adapter_warns": "saves what fits the base as it was, so that no warning is needed",
    r"TestRequiresGrad::test_requires_grad_(lora|modules_to_save_disabling)": "leaves requires_grad where adapters are "
    "switched off; they get no gradients",
    r"mixed_adapter_batches_training_mode_raises": "trains the adapters of a mixed batch, which PEFT refuses",
    r"mixed_adapter_batches_disabled": "takes adapter_names also where the active adapters are switched off",
    r"wrong_adapter_name_raises": "names the first unknown adapter, where PEFT names all",
    r"unmatched_(alpha|rank)_pattern|partially_matched_pattern|patterns?_no_matching|misconfigured_second_adapter|"
    r"test_rank_and_alpha_pattern_no_matching_keys": "refuses a pattern that matches nothing, of which PEFT warns",
    r"test_exclude_modules_not_used|TestExcludedModuleNames::test_realistic_example": "refuses an exclude_modules that "
    "excludes nothing, of which PEFT warns",
    r"targeted_module_names_unique": "lists layers in the order of the model",
    r"test_only_params_are_updated.*Conv1D 2 LoRA|test_lora_embedding_default": "passes with other random numbers "
    "only; so does PEFT",
    r"test_lora_embedding_gaussian": "draws A of an embedding too where the config says gaussian",
    r"lora_bias_when_base_layer_has_no_bias|with_bias_when_base_layer_has_no_bias_warns": "gives the base a bias where "
    "B's is merged, which PEFT refuses",
    r"invalid_target_(parameters|modules)_warns": "refuses a target that matches nothing, of which PEFT warns",
    r"safe_merge_does_not_mutate_base_layer_on_non_finite_bias": "refuses in other words",
    r"test_set_adapter_non_overlapping_modules": "shows as a layer's active adapters only those that it has",
    r"fixes_tie_word_embeddings_config": "leaves config.tie_word_embeddings to the caller, and says so",
    r"targeting_lora_to_embedding_layer": "saves an adapted embedding's own weight on request only, or targets nothing",
    r"target_module_and_target_parameter_on_same_layer": "refuses it as a TypeError",
    r"different_target_parameters_raises": "gives a further adapter parameters of its own, which PEFT refuses",
    r"hotswap_extra_key": "refuses it as a ValueError, with the keys of the file",
    r"mixed_adapter_batches_mha_raises": "refuses it as a ValueError",
    r"hotswap_missing_key|hotswap_unexpected": "refuses an adapter that lacks keys, which PEFT fills with zeros",
    r"hotswap_works_different_ranks_alphas": "refuses a rank above that of the memory",
    r"load_resized_embedding": "refuses an adapter for another vocabulary",
    r"delete_adapter_multiple_adapters_with_trainable_token_indices|targets_head_and_embedding": "has rows of a tied "
    "output layer at the embedding only",
    r"test_non_existing_model_card|test_existing_model_card": "writes a short card, and none where there is one",
    r"EncoderDecoder.*test_generate_pos_args": "takes positional arguments of generate, which PEFT refuses here",
    r"test_modules_to_save_targets_module_dict_raises": "trains a ModuleDict, which PEFT refuses",
    r"test_lora_with_bias_argument|test_no_modules_matched|test_targeting_module_to_save_raises|"
    r"targets_lora_layer_raises|test_modules_to_save_targets_tuner_layer_raises|test_get_peft_model_repeated_invocation|"
    r"second_adapter_only_modules_to_save_raises|test_targeting_trainable_tokens_raises|"
    r"test_valid_no_target_module_nor_target_parameter": "refuses in other words",
    r"test_from_pretrained_missing_keys_warning": "refuses an adapter with missing keys, of which PEFT only warns",
    r"test_get_peft_model_applies_find_target_modules": "writes full names where PEFT writes the shortest suffixes",
    r"same_modules_to_save_merging_adapters_raises": "copies the first adapter's module to save, or the one it is told",
    r"weight_tying.*(warn|false|no_embed)|test_alt_weight_tying": "warns in other words, or not",
}
#: Failures of which the first cause is a feature that lowbit_lora has not.
MISSING = {
    r"TestWeightTying": "LoRA on layers that share a weight, tied too (ensure_weight_tying with target_modules)",
    r"TestDoraCaching": "a cache of DoRA's norms (DoraCaching)",
    r"lora_conversion|LoraConversion": "adapters of other methods as LoRA (convert_to_lora)",
    r"TestCustomModelConfigWarning": "PEFT's warning of a base by another name",
    r"TestLowCpuMemUsage": "adapters on the meta device (low_cpu_mem_usage)",
    r"TestLayerRepr": "repr of PEFT's layers",
    r"TestDynamicDispatch": "LoRA classes of one's own for a layer type (_register_custom_module)",
    r"test_set_requires_grad": "requires_grad of chosen adapters (set_requires_grad)",
    r"test_loading_model_with.*requires_grad": "requires_grad of chosen adapters (set_requires_grad)",
    r"TestModelAndLayerStatus": "layer and model status",
    r"target_multiple_parameters_on_same|under_autocast|existing_parametrization|result_caching|reuses_param_wrapper|"
    r"rank_pattern_for_moe|parameter_on_top_level": "PEFT's ParamWrapper, and weights of no stack in target_parameters",
    r"TestTargetedParameterNames|prefixes_tuner_layer_inside|kasa_loss": "PEFT's inner names and messages",
    r"mha_gradients_set|mha_exposes_attributes": "PEFT's inner names of a MultiheadAttention",
    r"test_dora_(unmerge|params|save_and_load_remapping)|get_modules_tied_to_embedding|transient_attribute_access|"
    r"embed_scale_is_applied_mixed|unsharded_state_dict": "PEFT's inner names and messages",
}
#: What a failure is where this text stands in its traceback.
MISSING_TRACE = {
    r"has no attribute 'get_(layer|model)_status'": "layer and model status",
    r"enable_adapters|layer\.disable_adapters": "single layers switched off (layer.enable_adapters)",
}

#: What PEFT does to a quantized weight where this text stands in the traceback, and lowbit refuses.
REFUSED_ON_QUANTIZED = {
    r"add_: a quantized weight cannot be written": "adds to the weight in place, to merge (SHiRA: in each forward)",
    r"a quantized weight cannot be written|a dense tensor cannot be copied into": "writes into the weight, to merge",
    r"data: expected a lowbit.QuantizedTensor": "puts a dense weight in the quantized one's place, to merge",
    r"has no memory of its own layout": "saves a merged model that has quantized weights left, without LowbitConfig",
    r"requires_grad_: a quantized weight is frozen": "trains a copy of a quantized module (modules_to_save, bias)",
    r"expected a start that leaves the base as it is": "starts with another weight in the base",
}
#: Failures on quantized weights that were looked into.
EXPLAINED_ON_QUANTIZED: dict[str, str] = {}

_OPERATIONS = (
    (r"test_config\.py", "config class: to and from files, validation"),
    (r"hotswap|HotSwap", "hot-swapping an adapter"),
    (r"fsdp", "FSDP state dict"),
    (r"mixed_adapter_batch|mixed_batch|MixedAdapterBatches", "mixed adapters in one batch"),
    (r"weighted", "weighted combination of adapters"),
    (r"Corda|corda", "initialisation: CorDA"),
    (r"Eva|_eva", "initialisation: EVA"),
    (
        r"pissa|olora|loftq|orthogonal|gaussian|mica|lora_ga|LoraInitialization|Initialization|init_",
        "initialisation: others",
    ),
    (r"WeightTying|tied|tie_word", "tied weights"),
    (
        r"RankAndAlpha|rank_pattern|TestScaling|multirank|MultiRank|use_rslora|scale_layer",
        "rank_pattern, alpha_pattern, scaling",
    ),
    (r"target_parameter|TargetParameter", "target_parameters"),
    (
        r"Exclude|TargetedModule|module_matching|all_linear|FindMinimal|layers_to_transform|layer_indexing|"
        r"DefaultTarget|TestAdapterTargeting|TargetingAux|find_target|replication",
        "choice of target modules",
    ),
    (r"Status|status", "layer and model status"),
    (r"StateDict|state_dict|InjectAdapter|inject|low_level|LowLevel", "state dict API, inject_adapter_in_model"),
    (r"delete", "several adapters: delete"),
    (
        r"multiple_active|MultipleActive|sequential_merge|merge_layers_multi|unmerge_after",
        "several adapters: active together",
    ),
    (
        r"load_multiple|add_adapter|multiple_adapter|set_adapter|second_adapter|adding_multiple|active_adapter|"
        r"selected_adapter|adapter_name|substring",
        "several adapters: add, load, set, names",
    ),
    (r"disable|disabled", "disable_adapter"),
    (r"unload_adapter|unload_with", "unload"),
    (r"merge", "merge, unmerge, safe_merge"),
    (r"autocast|float16|half|fp16", "dtypes"),
    (r"repr", "repr"),
    (r"requires_grad", "requires_grad"),
    (r"prepare_for_training|training|only_params|gradient|DynamicDispatch", "training"),
    (r"generate|embeds|embed_scale", "generate"),
    (r"save|load|roundtrip|inference_safetensors|from_pretrained|parameters_after|model_card|push", "save and load"),
    (r"modules_to_save|ModulesToSave", "modules_to_save"),
    (r"variants|Variants|ActivatedLora|Kasa|dora|conversion", "variants: DoRA, aLoRA, KaSA, conversion"),
    (r"forward|attributes|features|device_map|weight_bias|no_infinite|no_warning", "forward and attributes"),
)


def feature(item):
    name = item.nodeid.partition("[")[0]
    test = name.rpartition("::")[2]
    for pattern, group in _OPERATIONS:  # the test's own name first, then its class and file
        if re.search(pattern, test):
            return group
    for pattern, group in _OPERATIONS:
        if re.search(pattern, name):
            return group
    return "other"


_BY_FIELD = (
    ("use_dora", "DoRA"),
    ("use_bdlora", "BD-LoRA"),
    ("velora_config", "VeLoRA"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("lora_bias", "lora_bias"),
    ("target_parameters", "target_parameters"),
    ("trainable_token_indices", "trainable_token_indices"),
    ("alora_invocation_tokens", "aLoRA"),
    ("init_lora_weights", "MiCA init"),
)


def layer(item):
    """The kind of layer that a test of the grid adapts."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    config, model = params.get("config_kwargs"), params.get("model_id")
    if not isinstance(config, dict) or not isinstance(model, str):
        return "(no grid)"
    for name, kind in _BY_FIELD:
        if config.get(name):
            return kind
    if "/" in model:
        return "model: " + model.rpartition("/")[2].removeprefix("tiny-").removeprefix("random-")
    kind = {"EmbConv1D": "Embedding, Conv1D", "MHA": "MultiheadAttention", "MLP": "Linear"}.get(model, model)
    targets = config.get("target_modules")
    if model == "EmbConv1D":
        kind = {("conv1d",): "Conv1D", ("emb",): "Embedding"}.get(tuple(targets), kind)
    return kind + (" + modules_to_save" if config.get("modules_to_save") else "")
