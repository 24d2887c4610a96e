"""The toy world that everything can be tried on in minutes, and the toy MLLM that was taught it."""
