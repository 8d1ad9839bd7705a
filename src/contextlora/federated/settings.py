"""What the air is like and what a round may cost: the settings of the channel and of clustering. No torch here.

As people write them, with units (a plain number is Hz, m, W or s):

    radio: {bandwidth: 20 MHz, radius: 200 m, step: 5 m, cast: broadcast}
    limits: {collision: 0.5, power: 200 mW, deadline: 2 s}
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from contextlora.gear.units import Hertz, Metres, Seconds, Watts
from contextlora.strict import Strict

Cast = Literal["unicast", "broadcast"]


class Limits(Strict):
    """What a round may cost: the constraints of SO-LoRA (11).

    Attributes:
        collision: S_max, the largest share of one layer's positions on which two or more members of a cluster may meet.
            It is the densest layer that decides: with `entropy` a tenth of all entries is .44 of a small layer's, and
            two devices meet on .19 of it, three on .39 (docs/so-lora.md). So 0.5 lets three be together.
        power: p_max (11b), W, of one device over all its receivers.
        deadline: Gamma (11a), s, from the start of a message to its end.
    """

    collision: Annotated[float, Field(ge=0, le=1)] = 0.5
    power: Watts = 0.2
    deadline: Annotated[Seconds, Field(gt=0)] = 2.0


class Radio(Strict):
    """The model of the air.

    Attributes:
        bandwidth: W, Hz, of each sender; n unicast receivers take W / n each (OFDMA).
        noise: density of thermal noise, dBm/Hz.
        noise_figure: what the receiver adds to it, dB.
        loss_at_1_km: path loss at 1 km, dB. With `exponent` 3.76 this is 3GPP's 128.1 + 37.6 log10(d / km).
        exponent: alpha of the path gain d^-alpha.
        radius: of the disc that the devices are in, m.
        nearest: distances below this count as this, m: the law of loss has no meaning at the antenna.
        step: root mean square way of a device from round to round, m; 0 means that devices stay where they are.
        cast: one transmission for each receiver ("unicast", as in the paper), or one for all.
        control: "inversion" sends with the least power that meets the deadline (eq. 25), "full" with p_max.
        outage: the probability with which fading may keep a receiver from its message in a round. Planning counts on
            the power gain that is exceeded with probability 1 - outage.
        measured: plan over the rates that devices have measured and tell each other in their rows; the model, or the
            trace, stands in for links that nothing has been measured of.
    """

    bandwidth: Hertz = 20e6
    noise: Annotated[float, Field(ge=-250, le=0)] = -174.0
    noise_figure: Annotated[float, Field(ge=0, le=50)] = 9.0
    loss_at_1_km: Annotated[float, Field(ge=0, le=300)] = 128.1
    exponent: Annotated[float, Field(ge=1, le=8)] = 3.76
    radius: Annotated[Metres, Field(gt=0)] = 200.0
    nearest: Annotated[Metres, Field(gt=0)] = 10.0
    step: Metres = 0.0
    cast: Cast = "unicast"
    control: Literal["inversion", "full"] = "inversion"
    outage: Annotated[float, Field(gt=0, lt=1)] = 0.05
    measured: bool = False

    @model_validator(mode="after")
    def _fits_the_disc(self) -> Radio:
        if self.step > self.radius:
            raise ValueError(f"step: {self.step:g} m a round is more than the radius of the disc, {self.radius:g} m")
        if self.nearest >= 2 * self.radius:
            raise ValueError(f"nearest: {self.nearest:g} m is as far as two devices of this disc can be apart")
        return self

    @property
    def noise_density(self) -> float:
        """N0, W/Hz: thermal noise and the receiver's own."""
        return 10 ** ((self.noise + self.noise_figure) / 10) * 1e-3

    @property
    def faded(self) -> float:
        """The power gain of fading, of mean 1, that is exceeded with probability 1 - outage."""
        return -math.log1p(-self.outage)
