"""vLLM on a pool of TinyServe: what one engine has computed of a prompt, the others load.

    vllm serve MODEL --kv-transfer-config \\
        '{"kv_connector": "TinyServeConnector", "kv_role": "kv_both"}'

vLLM finds the connector by an entry point of the package, so nothing is imported by hand. Nothing
of vLLM is imported here: register() is called by vLLM, and .connector has the class.
"""

from __future__ import annotations

CONNECTOR = "TinyServeConnector"


def register() -> None:
    """Makes the connector known to vLLM, which calls this in each of its processes. The connector
    itself says, when it is used, whether it supports this vLLM."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "tinyserve.vllm.connector", CONNECTOR)
