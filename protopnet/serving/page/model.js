/* What the server says of its model, and what its classes and prototypes are called. */

import { getJson } from "./api.js";

let asked = null;

/** The model behind the server, asked for once; again if that failed. */
export function modelKnown() {
  asked ??= getJson("v1/model").then(
    (answer) => new Model(answer),
    (error) => {
      asked = null;
      throw error;
    },
  );
  return asked;
}

class Model {
  constructor(answer) {
    this.hash = answer.model;
    this.limits = answer.limits;
    this.abstainBelow = answer.abstain_below;
    this.members = answer.members;
    this.names = answer.classes.map((entry) => entry.readable_name);
    this.prototypes = answer.prototypes;
  }

  get summary() {
    const ensemble = this.members.length > 1 ? ` in ${this.members.length} models` : "";
    return `${this.names.length} classes, ${this.prototypes.toLocaleString("en")} prototypes${ensemble}`;
  }

  /** "prototype 22", or "prototype 22 of model 1" in an ensemble; numbers as in the API; "red bill, prototype 22" if named. */
  number({ member, prototype, name }) {
    const number = `prototype ${prototype}` + (this.members.length > 1 ? ` of model ${member}` : "");
    return name ? `${name}, ${number}` : number;
  }

  /** "prototype 22 (Sooty Albatross)" */
  title(item) {
    return `${this.number(item)} (${this.names[item.class]})`;
  }
}
