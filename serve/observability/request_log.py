"""One log line per finished request: tokens, times and SLO outcome, never its content."""

import logging

from apt_jax.serve.openai.slo_report import slo_report
from apt_jax.serve.runtime.observer import Observer, Stepped

logger = logging.getLogger("apt_jax.requests")


class RequestLog(Observer):
    """Writes the lines."""

    def brought(self, step: Stepped) -> None:
        """Log those that the step finished."""
        for output in step.outputs:
            if output.finish_reason is None:
                continue
            request = output.request
            fields = {
                "id": request.request_id,
                "finish_reason": output.finish_reason.value,
                "prompt_tokens": request.num_prompt_tokens,
                "tokens": len(request.output_token_ids),
                **slo_report([request]),
            }
            logger.info("finished", extra={"fields": fields})
