# Where Nix with flakes comes in; everything is in nix/.
{
  description = "Remote Nix builds for CI runners that hold an OIDC token and no SSH key";
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
  outputs = inputs: import ./nix/outputs.nix inputs;
}
