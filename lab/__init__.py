"""The science of measuring: the machine and its ceilings, what theory allows, samplers, verdicts, records."""
