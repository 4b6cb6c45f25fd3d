// The API in words, made of /openapi.json.

import { $, el } from "./dom.js";

const described = await (await fetch("/openapi.json")).json();
$("intro").textContent = described.info.description;

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;

const resolve = (schema) => (schema.$ref ? described.components.schemas[schema.$ref.split("/").pop()] : schema);

function type(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(type).filter((name) => name !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${schema.items ? type(schema.items) : "values"}`;
  const ends = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  const range = ends.every((end) => end !== undefined) && Math.abs(ends[1]) < 1e9 ? `, ${ends[0]} to ${ends[1]}` : "";
  return `${schema.type ?? "value"}${range}`;
}

function table(title, fields, required = []) {
  const rows = fields.map(([name, schema]) => el("tr", {},
    el("td", {}, el("code", { textContent: name })),
    el("td", { textContent: type(schema) + (required.includes(name) ? ", needed" : "") }),
    el("td", { textContent: schema.description ?? "" })));
  return el("div", { className: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { textContent: title }), el("th"), el("th"))), el("tbody", {}, ...rows)));
}

function fieldsOf(title, schema) {
  const known = resolve(schema);
  return table(title, Object.entries(known.properties ?? {}), known.required);
}

for (const [path, methods] of Object.entries(described.paths)) {
  for (const [method, { description, requestBody, parameters, responses }] of Object.entries(methods)) {
    const section = el("section", { className: "panel" },
      el("h2", {}, el("span", { className: "method", textContent: `${method.toUpperCase()} ` }), el("code", { textContent: path })),
      el("p", { textContent: description }));
    if (parameters) section.append(table("Query", parameters.map(({ name, schema, ...rest }) => [name, { ...schema, ...rest }])));
    const json = requestBody?.content["application/json"];
    if (json) section.append(fieldsOf("Request", json.schema));
    else if (requestBody) section.append(el("p", { textContent: `Body: ${Object.keys(requestBody.content)[0]}` }));
    section.append(fieldsOf("Answer", responses["200"].content["application/json"].schema));
    $("docs").append(section);
  }
}
for (const name of ["SamplingSettings", "Picture", "Member", "ModelInfo", "Mistake"]) {
  $("docs").append(el("section", { className: "panel" }, el("h2", { textContent: name }), fieldsOf("Field", described.components.schemas[name])));
}
