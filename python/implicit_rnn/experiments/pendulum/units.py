"""What the headers of recorded tables say: the quantity of a column and its unit.

``Time/s``, ``t [ms]``, ``theta_deg``, ``Angle (°)``, ``Winkel in Grad``: a name, and a unit in brackets, behind a slash or
as the last word. A unit decides what a column is; where there is none, the words of the name do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

TIME, ANGLE, VELOCITY, FRAME, OTHER = "time", "angle", "angular velocity", "frame", "other"
"""What a column can be; ``OTHER`` is known not to be one of the rest."""

_SPELLINGS = {
    (TIME, "s", 1.0): "s sec secs second seconds sekunde sekunden sek segundos secondes",
    (TIME, "ms", 1e-3): "ms msec msecs millis millisecond milliseconds millisekunden",
    (TIME, "µs", 1e-6): "us µs μs usec micros microsecond microseconds mikrosekunden",
    (TIME, "ns", 1e-9): "ns nsec nanosecond nanoseconds",
    (TIME, "min", 60.0): "min minute minutes minuten",
    (FRAME, "frames", 1.0): "frame frames bild bilder",
    (ANGLE, "rad", 1.0): "rad rads radian radians radiant",
    (ANGLE, "mrad", 1e-3): "mrad milliradian milliradians",
    (ANGLE, "deg", np.pi / 180): "deg degs degree degrees ° º grad grados degrés",
    (ANGLE, "turns", 2 * np.pi): "rev revs revolution revolutions turn turns umdrehungen",
    (ANGLE, "counts", np.nan): "counts count cts ticks tick pulses impulse",
    (
        VELOCITY,
        "rad/s",
        1.0,
    ): "rad/s rad/sec rad·s⁻¹ rads^-1 rads⁻¹ rad·s^-1 rad*s^-1 1/s s^-1 s⁻¹ radians/s radians/second",
    (VELOCITY, "deg/s", np.pi / 180): "deg/s deg/sec °/s º/s dps degrees/s degrees/second °·s⁻¹ °s⁻¹",
    (OTHER, "", 1.0): (
        "m cm mm dm km in ft px pixel pixels m/s cm/s mm/s m/s^2 m/s² m/s2 m·s⁻² ms^-2 cm/s^2 rad/s^2 rad/s² rad/s2 "
        "deg/s^2 °/s² g gs mg v mv volt volts a ma n nm j w hz khz k °c c % t µt μt ut gauss pa hpa kpa kg db lux"
    ),
}
UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
"""What each spelling of a unit, in small letters, stands for: the quantity, the name of the unit, its size in SI.

The size of an encoder's counts is NaN: nobody knows it but who bought the encoder."""

_WORDS = {
    TIME: (
        "time t zeit zeitpunkt tid temps tiempo tempo tijd czas timestamp timestamps times elapsed seconds sec secs "
        "ms millis milliseconds uptime clock"
    ),
    FRAME: "frame frames frameno framenumber bild bildnummer",
    ANGLE: (
        "angle angles theta θ ϑ phi φ ϕ alpha α psi ψ winkel auslenkung auslenkungswinkel ausschlag ángulo angulo "
        "angolo ângulo kąt hoek vinkel deflection deflexion inclination inclinometer tilt pitch roll yaw rotation "
        "swing encoder angular degrees deg rad radians"
    ),
    VELOCITY: "omega ω gyro gyroscope gyroskop velocity speed rate winkelgeschwindigkeit drehrate thetadot θdot",
    OTHER: (
        "x y z r pos position height höhe distance abstand radius amplitude voltage spannung current acceleration "
        "accel accelerometer acc beschleunigung magnetic magnetometer temperature temperatur pressure force kraft "
        "energy energie error err sigma std stddev uncertainty unsicherheit target setpoint reference torque counter "
        "index row nr no id sample step pixel xpos ypos length"
    ),
}
_MEANING = {word: quantity for quantity, words in _WORDS.items() for word in words.split()}
_OTHER_FIRST = re.compile(r"(error|err|sigma|std\w*|uncertainty|unsicherheit|target|setpoint|reference|acc\w*)")
"""Words that make a column another one, whatever else its name says: angle error, angular acceleration."""
_SUBORDINATE = {"angular", "rotation", "degrees", "deg", "rad", "radians", "position", "pos", "x", "y", "z", "r", "no"}
"""Words that say what a column is only if no other word does: angular position, rotation rate, gyroscope x."""


@dataclass(frozen=True)
class Heading:
    """What is written above a column."""

    text: str
    quantity: str | None = None
    """``TIME``, ``ANGLE``, ``VELOCITY``, ``FRAME``, ``OTHER``, or None: it does not say."""
    unit: str | None = None
    """As ``UNITS`` names it, or None."""
    size: float = 1.0
    """The size of the unit in s, rad or rad/s."""

    @property
    def name(self) -> str:
        """Without the unit, in small letters: what two columns of one quantity in two units share."""
        return " ".join(re.findall(r"[^\W_]+", _split(self.text)[0].lower()))


def heading(text: str) -> Heading:
    """What a header cell says."""
    bare, unit = _split(text)
    words = _words(bare)
    meanings = [_MEANING[word] for word in words if word in _MEANING and word not in _SUBORDINATE]
    meanings = meanings or [_MEANING[word] for word in words if word in _MEANING]
    different = any(map(_OTHER_FIRST.fullmatch, words))
    if different:
        quantity: str | None = OTHER
    elif VELOCITY in meanings or re.match(r"d.*/ ?dt", text.strip().lower()):
        quantity = VELOCITY
    else:
        quantity = meanings[0] if meanings else None
    if unit is None:
        return Heading(text, quantity)
    kind, name, size = unit
    if quantity == OTHER and kind in (ANGLE, VELOCITY) and not different:
        quantity = None  # "position (deg)"
    if {quantity, kind} == {TIME, FRAME}:
        return Heading(text, kind, name, size)
    if quantity in (None, kind):
        return Heading(text, kind, name or None, size)
    if quantity == ANGLE and kind == VELOCITY:
        return Heading(text, VELOCITY, name, size)
    return Heading(text, OTHER)


def unit_of(text: str) -> tuple[str, str, float] | None:
    """The quantity, name and size of a unit written alone or in brackets; None for anything else."""
    return UNITS.get(re.sub(r"\s+", "", text.strip().strip("()[]").strip().lower()))


def _split(text: str) -> tuple[str, tuple[str, str, float] | None]:
    """A heading's name and its unit: in brackets, behind a slash, or the last word."""
    text = text.strip()
    for match in re.finditer(r"[(\[]([^)\]]*)[)\]]", text):
        if (unit := unit_of(match[1])) is not None:
            return (text[: match.start()] + " " + text[match.end() :]).strip(), unit
    if (unit := unit_of(text)) is not None and unit[0] != OTHER and len(text) > 1:
        return "", unit
    for pattern in (r"/\s*", r"\s+in\s+", r"[\s_,.;:-]+"):
        for match in re.finditer(pattern, text):
            unit = unit_of(text[match.end() :])
            if match.start() > 0 and unit is not None and not (unit[0] == OTHER and pattern != r"/\s*"):
                return text[: match.start()], unit
    return text, None


def _words(text: str) -> list[str]:
    """The words of a name in small letters: timeStamp_2 is time, stamp."""
    text = re.sub(r"([a-zäöü])([A-Z])", r"\1 \2", text)
    text = text.replace("θ̇", "ω").replace("\u0307", " omega")
    return re.findall(r"[^\W\d_]+", text.lower())
