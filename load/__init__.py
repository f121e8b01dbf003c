"""The load generator's parts: what is asked, when, and what the answers' times mean. Knows no engine and no torch."""
