"""How PEFT's tests are counted."""

import re

PROVIDER = {}
#: Failures looked into: lowbit_lora does it otherwise, and may.
EXPLAINED = {
    r"EncoderDecoder.*test_generate_pos_args": "takes positional arguments of generate, which PEFT refuses here",
    r"test_modules_to_save_targets_module_dict_raises": "trains a ModuleDict, which PEFT refuses",
    r"test_lora_with_bias_argument|test_no_modules_matched|test_targeting_module_to_save_raises|"
    r"test_modules_to_save_targets_tuner_layer_raises|test_get_peft_model_repeated_invocation": "refuses in other words",
    r"test_from_pretrained_missing_keys_warning": "refuses an adapter with missing keys, of which PEFT only warns",
    r"test_get_peft_model_applies_find_target_modules": "writes full names where PEFT writes the shortest suffixes",
}
MISSING = {
    r"test_loading_model.*requires_grad_set_correctly\[True": "PEFT's inner names: parameters named by adapter (.default)",
    r"(test_training_custom_models|test_only_params_are_updated)\[Vanilla MLP 5": "modules_to_save as a trained copy beside "
    "the frozen original (its names)",
    r"test_existing_model_card": "model card (README.md)",
    r"TestLayerRepr": "repr of PEFT's layers",
    r"TestDynamicDispatch": "LoRA classes of one's own for a layer type (_register_custom_module)",
}
#: Passes that check nothing here.
VACUOUS = {
    r"test_disable_adapters_exiting_context_irregular_state": "disable_adapter",
    r"TestHotSwapping": "hot-swapping an adapter",
    r"TestScalingAdapters": "rank_pattern, alpha_pattern, scaling: rescale_adapter_scale",
    r"TestTunerStateDictKeyPrefixes": "PEFT's inner names: others",
}
#: What a failure is where this text stands in its traceback.
MISSING_TRACE = {
    r"has no attribute 'get_(layer|model)_status'": "layer and model status",
    r"README\.md": "model card (README.md)",
    r"disable_adapters|enable_adapters": "single layers switched off (layer.enable_adapters)",
}

_OPERATIONS = (
    (r"test_config\.py", "config class: to and from files, validation"),
    (r"hotswap|HotSwap", "hot-swapping an adapter"),
    (r"fsdp", "FSDP state dict"),
    (r"mixed_adapter_batch|mixed_batch|MixedAdapterBatches", "mixed adapters in one batch"),
    (r"weighted", "weighted combination of adapters"),
    (r"Corda|corda", "initialisation: CorDA"),
    (r"Eva|_eva", "initialisation: EVA"),
    (r"pissa|olora|loftq|orthogonal|gaussian|mica|lora_ga|LoraInitialization|Initialization|init_", "initialisation: others"),
    (r"WeightTying|tied|tie_word", "tied weights"),
    (r"RankAndAlpha|rank_pattern|TestScaling|multirank|MultiRank|use_rslora|scale_layer", "rank_pattern, alpha_pattern, scaling"),
    (r"target_parameter|TargetParameter", "target_parameters"),
    (r"Exclude|TargetedModule|module_matching|all_linear|FindMinimal|layers_to_transform|layer_indexing|DefaultTarget|TestAdapterTargeting|TargetingAux|find_target|replication", "choice of target modules"),
    (r"Status|status", "layer and model status"),
    (r"StateDict|state_dict|InjectAdapter|inject|low_level|LowLevel", "state dict API, inject_adapter_in_model"),
    (r"delete", "several adapters: delete"),
    (r"multiple_active|MultipleActive|sequential_merge|merge_layers_multi|unmerge_after", "several adapters: active together"),
    (r"load_multiple|add_adapter|multiple_adapter|set_adapter|second_adapter|adding_multiple|active_adapter|selected_adapter|adapter_name|substring", "several adapters: add, load, set, names"),
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
