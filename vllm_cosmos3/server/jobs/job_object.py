"""A job as the JSON that clients read: OpenAI's fields, and one block ``cosmos3`` with the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_cosmos3.server.jobs.journal import COMPLETED, FAILED, QUEUED, Job

if TYPE_CHECKING:
    from vllm_cosmos3.server.jobs.service import Service


def video_json(job: Job, at: Service) -> dict[str, Any]:
    """The video object of OpenAI's API, with our block."""
    frames = job.frames_before + int(job.effective["num_frames"])
    seconds = frames / float(job.effective["fps"])
    done = job.status == COMPLETED
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": None if job.completed is None else int(job.completed),
        "expires_at": int(job.expires) if done and job.expires else None,
        "prompt": job.prompt,
        "seconds": f"{seconds:.6g}",
        "size": job.effective["output_size"],
        "quality": "default",
        "remixed_from_video_id": job.remixed_from,
        "error": {**job.error, "type": None, "param": None}
        if job.status == FAILED and job.error
        else None,
        "media_type": "video/mp4",
        "file_name": f"{job.id}.mp4" if done else None,
        "fps": job.effective["fps"],
        "num_frames": frames,
        "duration_s": seconds,
        "inference_time_s": job.timings.get("total"),
        "stage_durations": job.timings,
        "peak_memory_mb": round(job.peak_memory / 2**20, 1),
        "action": job.action,
        "usage": job.usage or None,
        "cosmos3": details(job, at),
    }


def details(job: Job, at: Service) -> dict[str, Any]:
    """What OpenAI's object has no place for."""
    return {
        "mode": job.effective["mode"],
        "effective": job.effective,
        "sources": job.sources,
        "warnings": job.warnings,
        "upsampled_prompt": job.upsampled_prompt,
        "continued_from": job.continued_from,
        "queue": {"position": job.position, "eta_s": job.eta} if job.status == QUEUED else None,
        "phase": job.phase,
        "step": job.step,
        "num_steps": job.num_steps,
        "eta_s": job.eta,
        "timings_s": job.timings,
        "peak_memory_mb": round(job.peak_memory / 2**20, 1),
        "seed": job.effective["seed"],
        "guardrails": job.guardrails,
    }
