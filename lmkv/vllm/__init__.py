"""The connector for vLLM 0.32, loaded by `kv_connector_module_path: lmkv.vllm.connector`."""
