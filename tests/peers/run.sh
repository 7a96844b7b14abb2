#!/bin/bash
# Runs PEFT's own LoRA tests against lowbit_lora, or PEFT itself on quantized models: run.sh CHECKOUT PYTHON [pytest arguments].
#
# CHECKOUT is PEFT's source archive, unpacked: it holds PEFT's tests. PYTHON has lowbit, transformers and what README.md
# lists. PEER_BASELINE=1 runs the same tests with PEFT itself, to learn which fail here without lowbit. PEER_BASE=quantized
# runs the grids of all of PEFT's methods with PEFT itself on quantized models, PEER_BASE=dense the same on dense ones, and
# PEER_BASE=decoded on quantized ones that are decoded before PEFT merges.
# PEER_OUT (build/peers) gets the JSON lines and logs; PEER_FILES chooses test files.
set -euo pipefail
checkout=$(realpath "$1"); python=$(realpath -s "$(command -v "$2")"); shift 2  # -s: not the Python that a venv links to
here=$(dirname "$(realpath "$0")")
out=$(realpath -m "${PEER_OUT:-build/peers}")
name=${PEER_BASE:-$([[ ${PEER_BASELINE:-0} == 1 ]] && echo baseline || echo lowbit)}
work=$out/$name
rm -rf "$work"; mkdir -p "$work"
cp -r "$checkout/tests" "$work/tests"
touch "$work/tests/__init__.py" "$work/pytest.ini"  # the archive leaves the first out; the second keeps our settings away
hub=$out/hub
[[ -d $hub ]] || OMP_NUM_THREADS=1 "$python" "$here/tiny_hub.py" "$hub" >"$out/hub.log" 2>&1
if [[ -n ${PEER_BASE:-} ]]; then  # a tenth of the grids: of each method what computes with the base, on two kinds of models
  PEER_FILES=${PEER_FILES:-test_custom_models.py test_decoder_models.py}
  what="test_merge_layers or safe_merge or test_training_ or test_generate or test_save_pretrained or test_disable_adapter"
  what+=" or mixed_adapter_batches or weighted or forward_bfloat16 or only_params or load_multiple or unload or delete_adapter"
  not="idempotent or fp16 or nan or deterministic or pickle or selected or substring or indexing or context or reentrant"
  not+=" or warns or autocast or fsdp or cleans or generate_ or inference"
  set -- -k "(OPTForCausalLM or MLP) and ($what or parameters_after) and not ($not)" "$@"
fi
files=${PEER_FILES:-test_custom_models.py test_initialization.py test_tuners_utils.py test_lora_variants.py
  test_target_parameters.py test_low_level_api.py test_other.py test_mapping.py test_config.py test_decoder_models.py
  test_encoder_decoder_models.py test_feature_extraction_models.py test_seq_classifier.py test_helpers.py test_auto.py
  test_lora_conversion.py}
report=$out/$name.jsonl; rm -f "$report"
(
  cd "$work"
  # shellcheck disable=SC2046 (one argument a file)
  HF_HOME=$hub HF_HUB_OFFLINE=1 PYTHONPATH=$work:$here:$checkout/src:${PYTHONPATH:-} PEER_REPORT=$report \
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES='' "$python" -m pytest -p plugin -q --no-header --tb=native \
    --continue-on-collection-errors -p no:cacheprovider -W ignore --timeout=60 "$@" $([[ $files == none ]] || printf "tests/%s " $files)
) >"$out/$name.log" 2>&1 || true
tail -1 "$out/$name.log"
case $name in
  lowbit) baseline=$out/baseline.jsonl ;;
  quantized | decoded) baseline=$out/dense.jsonl ;;
  *) baseline= ;;
esac
[[ -f $baseline ]] || baseline=
"$python" "$here/table.py" "$report" $baseline
