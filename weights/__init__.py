"""Where models come from (hub, folder, GGUF file, embedded, random), and on which device they are put."""
