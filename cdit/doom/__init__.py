"""The simulator: engine wrapper, exploring policy, recorder, camera and wall geometry."""
